"""A training step as the published distillation repositories have it (the structure of RepDistiller's and mdistiller's loops).

Images are PIL's and are cropped, flipped and normalised one by one in a DataLoader's workers; the optimizer is unfused, the
teacher runs in every step, and loss and top-1 are fetched from the device after every step. Workers stay, theirs start anew
in every epoch: that part of the published loops' time is not counted.
"""

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, softmax
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdfast.all import ImageData, create_model


class Pictures(Dataset):
    """One image and label at a time, transformed."""

    def __init__(self, data: ImageData):
        self.images, self.labels = data.images.permute(0, 2, 3, 1).numpy(), data.labels.tolist()
        crop = transforms.RandomCrop(data.size, padding=data.size // 8)
        normalise = transforms.Normalize(*data.stats)
        self.change = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.images[i])), self.labels[i]


def step(student: str, teacher: str, data: ImageData, batch: int, device: str, workers: int) -> Callable[[], None]:
    """A function that does the next step; without a teacher on labels alone, else by KD (0.1 labels, 0.9 teacher, T 4)."""
    loader = DataLoader(Pictures(data), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)
    model, taught = (create_model(name, len(data.classes), data.size).to(device) if name else None for name in (student, teacher))
    loss_of_labels = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    batches, sums = _forever(loader), [0.0, 0.0]

    def one() -> None:
        images, labels = (x.to(device) for x in next(batches))
        logits = model.train()(images)
        loss = loss_of_labels(logits, labels)
        if taught is not None:
            with torch.no_grad():
                said = taught.eval()(images)
            soft = kl_div(log_softmax(logits / 4, 1), softmax(said / 4, 1), reduction="batchmean") * 16
            loss = 0.1 * loss + 0.9 * soft
        sums[0] += loss.item()
        sums[1] += logits.argmax(1).eq(labels).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return one


def _forever(loader: DataLoader) -> Iterator:
    while True:
        yield from loader
