"""What fmexp is measured against: the work of PyTorch's TensorBoard tutorial in a plain script.

    python benchmarks/tutorial.py <folder with FashionMNIST/raw unpacked> <folder for the events> [batches]

The last line of its output is JSON: the seconds of each part and the accuracy. Nothing of fmexp is used.
"""

import json
import sys
import time

started = time.perf_counter()

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn, optim  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402
from torchvision import transforms  # noqa: E402

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle Boot")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 4 * 4)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def draw(image) -> None:
    """Show one normalised image in the current axes."""
    plt.imshow((image.mean(dim=0) / 2 + 0.5).numpy(), cmap="Greys")


def predictions(net, images, labels):
    """A figure of 12x48 inches with four images, their predicted and their true classes."""
    output = net(images)
    guesses = output.argmax(1).numpy()
    chances = [F.softmax(one, dim=0)[guess].item() for guess, one in zip(guesses, output, strict=True)]
    figure = plt.figure(figsize=(12, 48))
    for place in range(4):
        axes = figure.add_subplot(1, 4, place + 1, xticks=[], yticks=[])
        draw(images[place])
        right = guesses[place] == labels[place].item()
        title = f"{CLASSES[guesses[place]]}, {100 * chances[place]:.1f}%\n(label: {CLASSES[labels[place]]})"
        axes.set_title(title, color="green" if right else "red")
    return figure


def main(data: str, events: str, batches: int | None) -> None:
    seconds = {"imports": time.perf_counter() - started}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name], began = time.perf_counter() - began, time.perf_counter()

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    trainset, testset = (torchvision.datasets.FashionMNIST(data, train=t, transform=transform) for t in (True, False))
    trainloader = DataLoader(trainset, batch_size=4, shuffle=True, num_workers=2)
    testloader = DataLoader(testset, batch_size=4, shuffle=False, num_workers=2)
    net = Net()
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    writer = SummaryWriter(events)
    lap("setup")

    images, labels = next(iter(trainloader))
    grid = torchvision.utils.make_grid(images)
    draw(grid)
    writer.add_image("four_fashion_mnist_images", grid)
    lap("grid")
    writer.add_graph(net, images)
    lap("graph")
    chosen = torch.randperm(len(trainset.data))[:100]
    images, labels = trainset.data[chosen], trainset.targets[chosen]
    names = [CLASSES[label] for label in labels]
    writer.add_embedding(images.view(-1, 28 * 28), metadata=names, label_img=images.unsqueeze(1))
    lap("embedding")

    running = 0.0
    for i, (images, labels) in enumerate(trainloader):
        if i == batches:
            break
        optimizer.zero_grad()
        loss = criterion(net(images), labels)
        loss.backward()
        optimizer.step()
        running += loss.item()
        if i % 1000 == 999:
            writer.add_scalar("training loss", running / 1000, i)
            writer.add_figure("predictions vs. actuals", predictions(net, images, labels), global_step=i)
            running = 0.0
    lap("training")

    probabilities, truth = [], []
    with torch.no_grad():
        for images, labels in testloader:
            output = net(images)
            probabilities.append([F.softmax(one, dim=0) for one in output])
            truth.append(labels)
    probabilities = torch.cat([torch.stack(batch) for batch in probabilities])
    truth = torch.cat(truth)
    for index, name in enumerate(CLASSES):
        writer.add_pr_curve(name, truth == index, probabilities[:, index], global_step=0)
    lap("evaluation")
    writer.close()
    accuracy = (probabilities.argmax(1) == truth).float().mean().item()
    print(json.dumps({"seconds": seconds, "accuracy": accuracy}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
