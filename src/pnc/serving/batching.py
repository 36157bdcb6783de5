"""Dynamic batching: images that arrive together are computed together, by one network, in one thread."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.composite.answering import Prediction
from pnc.foundation.errors import PNCError
from pnc.serving.limits import Limits
from pnc.serving.refusals import BUSY, Refusal
from pnc.serving.served_set import ServedSet


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to one request.

    Attributes:
        predictions: One for each image.
        served: The set of clones that gave all of them.
        batch: Number of images that were computed together.
    """

    predictions: tuple[Prediction, ...]
    served: ServedSet
    batch: int


@dataclass(frozen=True, eq=False)
class _Job:
    images: Tensor
    names: Sequence[str | None]
    wanted: frozenset[str] | None
    arrived: float
    answer: "asyncio.Future[Answer]"


class Batcher:
    """A queue in front of a network. The images of one request are never split.

    Args:
        current: Returns the set of clones to use for the next batch.
        limits: `batch` and `wait_ms` count.
        device: Where the network computes.
        seen: Is called with the size of each batch.
    """

    def __init__(
        self, current: Callable[[], ServedSet], limits: Limits, device: torch.device, seen: Callable[[int], None]
    ) -> None:
        self._current, self._limits, self._device, self._seen = current, limits, device, seen
        self._thread = ThreadPoolExecutor(1, "pnc-compute")
        self._jobs: deque[_Job] = deque()
        self._n_images, self._closed = 0, False
        self._some, self._full = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to compute batches; call it in the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Compute what is queued, then stop; later requests are refused."""
        self._closed = True
        self._some.set()
        self._full.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def answer(self, images: Tensor, names: Sequence[str | None], wanted: frozenset[str] | None) -> Answer:
        """Wait for the predictions of some images.

        Args:
            images: (N, C, H, W) with N at most `limits.batch`.
            names: Names of the images, if they have any.
            wanted: As in `ServedSet.predictions`.
        Raises:
            Refusal: 503 if the server is stopping.
            InputError: a wanted clone is not attached.
        """
        if self._closed:
            raise Refusal(BUSY, "the server is stopping; try another one", 1)
        loop = asyncio.get_running_loop()
        job = _Job(images, names, wanted, loop.time(), loop.create_future())
        self._jobs.append(job)
        self._n_images += len(images)
        self._some.set()
        if self._n_images >= self._limits.batch:
            self._full.set()
        return await job.answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            if not self._jobs and self._closed:
                return
            await self._filled()
            jobs = self._taken()
            done = loop.run_in_executor(self._thread, self._compute, self._current(), jobs)
            await asyncio.wait([done])
            failed = done.exception()
            answers: Sequence[Answer | BaseException] = [failed] * len(jobs) if failed else done.result()
            for job, answer in zip(jobs, answers, strict=True):
                if job.answer.done():  # its client is gone
                    continue
                if isinstance(answer, BaseException):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

    async def _filled(self) -> None:
        """Wait until a batch is full, or its first image has waited `wait_ms` since it arrived."""
        if self._n_images >= self._limits.batch or self._closed:
            return
        self._full.clear()
        try:
            async with asyncio.timeout_at(self._jobs[0].arrived + self._limits.wait_ms / 1000):
                await self._full.wait()
        except TimeoutError:
            return

    def _taken(self) -> list[_Job]:
        jobs, n_images = [], 0
        while self._jobs and n_images + len(self._jobs[0].images) <= self._limits.batch:
            jobs.append(self._jobs.popleft())
            n_images += len(jobs[-1].images)
        self._n_images -= n_images
        if not self._jobs and not self._closed:
            self._some.clear()
        return jobs

    def _compute(self, served: ServedSet, jobs: Sequence[_Job]) -> list[Answer | PNCError]:
        images = torch.cat([job.images for job in jobs])
        self._seen(len(images))
        with torch.inference_mode():
            logits = served.net(images.to(self._device)).float().cpu()
        answers: list[Answer | PNCError] = []
        for job, rows in zip(jobs, logits.split([len(job.images) for job in jobs]), strict=True):
            try:
                answers.append(Answer(served.predictions(rows, job.names, job.wanted), served, len(images)))
            except PNCError as error:
                answers.append(error)
        return answers
