"""Sounds are images too: a network that hears three kinds of sound gets two more from another network.

pnc only needs images (B, C, H, W): here spectrograms, one channel, frequency by time. The example makes the sounds
itself. Run it: python examples/spectrograms.py (no download, half a minute).
"""

import math

import torch
from torch import Tensor, nn

import pnc

RATE, SECONDS = 8000, 0.5
KNOWN, NEW = ["rising", "falling", "steady"], ["trill", "pulses"]


def sound(kind: str, generator: torch.Generator) -> Tensor:
    """Make half a second of one kind of sound in noise, at a random pitch: (4000,)."""
    time = torch.arange(int(RATE * SECONDS)) / RATE
    pitch = 600 + 900 * torch.rand((), generator=generator)
    slope = {"rising": 2000, "falling": -800}.get(kind, 0)
    wobble = 150 * torch.sin(2 * math.pi * 12 * time) if kind == "trill" else torch.zeros_like(time)
    tone = torch.sin(2 * math.pi * torch.cumsum(pitch + slope * time + wobble, 0) / RATE)
    loudness = (torch.sin(2 * math.pi * 10 * time) > 0).float() if kind == "pulses" else 1.0
    return tone * loudness + 0.3 * torch.randn(len(time), generator=generator)


def spectrograms(sounds: Tensor) -> Tensor:
    """Turn sounds (N, T) into images (N, 1, 64, 63): log power at each frequency and time, scaled to [0, 1]."""
    spectra = torch.stft(sounds, 126, hop_length=64, window=torch.hann_window(126), return_complex=True)
    decibels = 10 * torch.log10(spectra.abs().square() + 1e-4)
    return ((decibels + 40) / 80).clamp(0, 1)[:, None]


def draw(kinds: list[str], n_sounds: int, seed: int) -> pnc.ImageSet:
    """Draw `n_sounds` of each kind, as labelled images."""
    generator = torch.Generator().manual_seed(seed)
    sounds = torch.stack([sound(kind, generator) for kind in kinds for _ in range(n_sounds)])
    labels = torch.arange(len(kinds)).repeat_interleave(n_sounds)
    return pnc.ImageSet(spectrograms(sounds), labels, tuple(kinds))


def train(data: pnc.ImageSet, seed: int) -> nn.Module:
    """Train a small network, as a stand-in for yours."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(data.classes)))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        for batch in torch.randperm(len(data), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(data.images[batch]), data.labels[batch]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    """Run the whole job."""
    target, source = train(draw(KNOWN, 150, seed=0), seed=0), train(draw(NEW, 150, seed=1), seed=1)

    support = draw([*KNOWN, *NEW], 10, seed=2)  # ten sounds of each kind
    clone = pnc.clone(source, target, support, source_classes=NEW, base_classes=KNOWN, name="more sounds")
    net = pnc.attach(target, clone)
    print(pnc.evaluate(net, draw([*KNOWN, *NEW], 60, seed=3)))

    heard = spectrograms(sound("trill", torch.Generator().manual_seed(4))[None])
    for one in pnc.predict(net, heard):
        print(f"{one} - from {one.clone or 'the target itself'}")


if __name__ == "__main__":
    main()
