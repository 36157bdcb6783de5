"""What a server answers, as types for its OpenAPI."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ClassScore(BaseModel):
    """One class of one image."""

    model_config = ConfigDict(extra="forbid")

    class_: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)
    clone: str | None = Field(description="The clone that has this class; null for a class of the target's own.")


class ImageAnswer(BaseModel):
    """The most probable classes of one image, highest first."""

    model_config = ConfigDict(extra="forbid")

    image: str | None = Field(description="Name of its file, if it came with one.")
    clone: str | None = Field(description="The clone that has the most probable class; null for the target.")
    classes: list[ClassScore]


class PredictAnswer(BaseModel):
    """Predictions, and the one set of clones that made all of them."""

    model_config = ConfigDict(extra="forbid")

    predictions: list[ImageAnswer]
    clones: list[str] = Field(description="Names of the clones that were attached.")
    generation: int = Field(description="Number of that set; counts the changes since the server started.")
    batch: int = Field(description="Images that were computed together with these.")


class CloneAnswer(BaseModel):
    """One attached clone."""

    model_config = ConfigDict(extra="forbid")

    name: str
    classes: list[str]
    owner: Literal["http", "folder", "command"] = Field(description="Where it came from.")
    target_cut: str
    source_cut: str
    n_macs: int = Field(description="Multiply-accumulates that it adds per image.")
    n_params: int
    n_bytes: int
    density: float
    calibrated: bool


class RefusedFile(BaseModel):
    """A file of the watched folder that is not attached."""

    file: str
    reason: str


class ClonesAnswer(BaseModel):
    """What is attached now."""

    model_config = ConfigDict(extra="forbid")

    generation: int
    base_classes: list[str] = Field(description="The target's own classes.")
    clones: list[CloneAnswer]
    input_shape: list[int] = Field(description="Channels, height and width of the network's images.")
    refused: list[RefusedFile]


class ErrorAnswer(BaseModel):
    """Why a request was refused, in one line."""

    error: str


class StateAnswer(BaseModel):
    """Whether the server works."""

    status: str
