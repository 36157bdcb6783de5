"""My timm model in production gets classes of another timm model, and keeps its own loader and normalization.

Run it: python examples/my_timm_model.py (needs the extras digits and models; no download, about two minutes).
"""

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pnc

# 1. What you have. The target takes grey 16x16 images that its loader normalizes; the source 32x32 in colour, with
#    another normalization. Here both are small and trained on the spot; yours come from your checkpoints, or from the
#    timm hub with their own preprocessing: pnc.load_model("timm:resnet18").
TARGET_NORMALIZATION = pnc.Normalization(mean=0.3, std=0.35)
SOURCE_MEAN, SOURCE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KNOWN, NEW = ["0", "1", "2", "3", "4"], ["5", "6", "7", "8", "9"]


def as_production_loads_it(data: pnc.ImageSet) -> Tensor:
    """Stand-in for your loader: here it enlarges and normalizes images."""
    return TARGET_NORMALIZATION.apply(nn.functional.interpolate(data.images, (16, 16), mode="bilinear"))


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int = 12) -> nn.Module:
    """Stand-in for the training that you did long ago."""
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    """Run the whole job."""
    torch.manual_seed(0)
    train_set, test_set = pnc.load_data("digits", "train"), pnc.load_data("digits", "test")
    images, old = as_production_loads_it(train_set), train_set.labels < 5

    target = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    train(target, images[old], train_set.labels[old])

    bare_source = timm.create_model("test_efficientnet", num_classes=5)
    # 2. Only the source is wrapped. `given` is the normalization that the images already have: it is undone, then the
    #    images are resized, converted to colour, and normalized as the source needs them.
    source = pnc.Preprocessed(bare_source, (3, 32, 32), SOURCE_MEAN, SOURCE_STD, given=TARGET_NORMALIZATION)
    train(source, images[~old], train_set.labels[~old] - 5)

    # 3. Clone from batches of the target's own loader: 20 images of each new class, 5 of each old one.
    counts = {label: 5 if label < 5 else 20 for label in range(10)}
    rows = torch.cat([(train_set.labels == label).nonzero().flatten()[:n] for label, n in counts.items()])
    loader = DataLoader(TensorDataset(images[rows], train_set.labels[rows]), batch_size=32)
    clone = pnc.clone(source, target, loader, source_classes=NEW, base_classes=KNOWN)
    pnc.save(clone, "my_clone.safetensors")

    # 4. In production: the unchanged target, and one more file.
    net = pnc.attach(target, pnc.load("my_clone.safetensors", source=source))
    print(pnc.evaluate(net, (as_production_loads_it(test_set), [test_set.classes[label] for label in test_set.labels])))

    # 5. Files, Pillow images and arrays are read and normalized for you; pass the target's normalization.
    photo = test_set.images[-1, 0].mul(255).byte().numpy()
    print(pnc.predict(net, photo, normalization=TARGET_NORMALIZATION)[0])


if __name__ == "__main__":
    main()
