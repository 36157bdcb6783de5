"""Examples that the help of each command shows."""

from collections.abc import Mapping

_PAIR = "--source source.safetensors --target target.safetensors"

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "demo": ("pnc demo --report demo.html",),
    "pretrain": ("pnc pretrain zoo:cnn --data digits --classes 0-4 --epochs 20 --out target.safetensors",),
    "clone": (
        f"pnc clone {_PAIR} --data digits --out new.safetensors",
        "pnc clone --source timm:resnet18 --target mine.safetensors --data folder:photos --support 20/5 --flip "
        "--out new.safetensors",
    ),
    "scan": (f"pnc scan {_PAIR} --data digits --max-macs 0.5 --plot scan.png",),
    "eval": (f"pnc eval new.safetensors {_PAIR} --data digits", "pnc eval full.safetensors --target mine.safetensors "
             "--data folder:photos"),
    "predict": (f"pnc predict photos/ --clone new.safetensors {_PAIR}",),
    "calibrate": (f"pnc calibrate pets.safetensors birds.safetensors {_PAIR} --data folder:photos --out calibrated",),
    "report": (f"pnc report new.safetensors {_PAIR} --data digits --out report.html",),
    "serve": ("pnc serve --clone new.safetensors --target mine.safetensors --source timm:resnet18 --port 8000",),
    "inspect": ("pnc inspect new.safetensors",),
    "verify": (f"pnc verify new.safetensors {_PAIR}",),
    "export": (
        f"pnc export new.safetensors {_PAIR} --out net.onnx",
        f"pnc export new.safetensors {_PAIR} --out deploy --split",
    ),
    "cuts": ("pnc cuts zoo:resnet20 --input-shape 3,32,32",),
}  # fmt: skip
"""By command; each line can be run where its files are."""


def examples(command: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(("Examples:" if len(EXAMPLES[command]) > 1 else "Example:", *EXAMPLES[command]))
