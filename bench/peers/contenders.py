"""One step or evaluation in kshot, easyfsl, learn2learn, higher and torchopt, for bench/speed.py.

    python contenders.py '{"case": "protonet", "shape": [60, 1, 5], ...}'      # by the Python of environment.py

All have one network: conv4-64 with one set of weights, batch normalisation by each batch's own statistics, images in
memory, one thread. The peers get it as torch's ordinary modules, and their own functions do the rest. Prints JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from environment import import_peers
from torch import Tensor, nn
from torch.nn import functional as F

from kshot import malloc
from kshot.data.datasets import ClassImages, ImageSet
from kshot.data.episodes import Episodes, Shape, sample_episodes
from kshot.evaluation.scores import evaluate
from kshot.learner import Learner
from kshot.recipe import Recipe
from kshot.training import Training, learner_step
from kshot_plugins import conv4
from kshot_plugins.gradient_learner import Descent
from kshot_plugins.protonet import ProtoNet

Step = Callable[[], float]
RATE = 0.4  # of MAML's inner steps, for all weights
PEERS: tuple[ModuleType, ...] = ()
DEVICE = "cpu"


def main(asked: dict[str, Any]) -> dict[str, Any]:
    global PEERS, DEVICE
    warnings.simplefilter("ignore")
    DEVICE = asked.pop("device", DEVICE)
    torch.set_num_threads(1)
    PEERS = import_peers()
    measures = (losses, steps, ablation, memory, evaluation, uncached)
    return {each.__name__: each for each in measures}[asked.pop("measure")](**asked)


def losses(method: str, data: str, shape: list[int], **options: Any) -> dict[str, Any]:
    """The first loss of each contender, in float64: rounding in float32, over MAML's steps, may change an episode's."""
    torch.set_default_dtype(torch.float64)
    return {name: step() for name, step in contenders(method, classes(data, "train"), Shape(*shape), **options).items()}


def steps(
    method: str, data: str, shape: list[int], rounds: int, only: str = "", kept: bool = True, **options: Any
) -> dict[str, Any]:
    """Milliseconds of each contender in each round: interleaved, or one contender alone."""
    made = contenders(method, classes(data, "train"), Shape(*shape), **options)
    with tuned(kept):
        return in_turns({name: step for name, step in made.items() if only in ("", name)}, rounds)


def in_turns(made: dict[str, Step], rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(-3, rounds):  # in the first three, the heap grows
        for name, step in made.items():
            took = 1000 * seconds(step)
            if turn >= 0:
                times[name].append(took)
    return {"times": times}


def ablation(cause: str, method: str, data: str, shape: list[int], rounds: int, **options: Any) -> dict[str, Any]:
    """Milliseconds of a step of kshot's with one of its means, and without, interleaved; and the first losses."""
    images = classes(data, "train")
    steps = [kshot_step(*ours(method, images, Shape(*shape), **options)) for _ in range(2)]

    def without() -> float:
        with patch.object(*WITHOUT[cause]):
            return steps[1]()

    made = {"kshot": steps[0], "without": without}
    with tuned(True):
        return {"losses": {name: step() for name, step in made.items()}, **in_turns(made, rounds)}


WITHOUT: dict[str, tuple[Any, str, Any]] = {
    "layout": (conv4, "channels_last", lambda images: images.clone(memory_format=torch.contiguous_format)),
    "order": (conv4, "convolve", lambda maps, conv, norm, pool=1: F.max_pool2d(norm(conv(maps)), pool)),
    "first step": (Descent, "closed_form_start", False),
}
"""What stands in for each of kshot's means where it is left out."""


def uncached(data: str, rounds: int, episodes: int, some: int) -> dict[str, Any]:
    """Seconds of `episodes` ProtoNet test episodes on cached features, and of `some` that embed all their images."""
    images, shape = classes(data, "test"), Shape(5, 1, 15)
    times: dict[str, list[float]] = {"kshot": [], "without": []}
    with tuned(True):
        for turn in range(rounds):
            for name, count in (("kshot", episodes), ("without", some)):
                learner = build("protonet", images.shape, seed=turn)
                cached = (
                    contextlib.nullcontext() if name == "kshot" else patch.object(ProtoNet, "takes_features", False)
                )
                started = time.process_time()
                with cached:
                    evaluate(learner, images, shape, count, seed=turn)
                times[name].append((time.process_time() - started) * episodes / count)
    return {"times": times}


def memory(method: str, data: str, shape: list[int], only: str, **options: Any) -> dict[str, Any]:
    """Megabytes by which three outer steps of one contender raise the most memory that this process has held."""
    step = contenders(method, classes(data, "train"), Shape(*shape), **options)[only]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tuned(only == "kshot"):  # as it trains; the others as they come
        for _ in range(3):
            step()
    return {"mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def evaluation(
    method: str, data: str, rounds: int, episodes: int, peer_episodes: int, **options: Any
) -> dict[str, Any]:
    """Seconds of each round for so many episodes of 5-way 1-shot with 15 queries, and accuracies in %."""
    images, shape = classes(data, "test"), Shape(5, 1, 15)
    make = {"protonet": protonet_evaluation, "maml": maml_evaluation}[method]
    times: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}
    with tuned(True):
        for turn in range(-1, rounds):  # the first, a short one, is to get warm
            parts = (episodes, peer_episodes) if turn >= 0 else (8, 8)
            for name, run in make(images, shape, *parts, turn, **options).items():
                started = clock()
                accuracy = run()
                if turn >= 0:
                    times.setdefault(name, []).append(clock() - started)
                    accuracies.setdefault(name, []).append(accuracy)
    return {"accuracies": {name: float(np.mean(found)) for name, found in accuracies.items()}, "times": times}


def contenders(method: str, images: ClassImages, shape: Shape, **options: Any) -> dict[str, Step]:
    """An outer step by name, each from the same weights on the same images; it returns its loss."""
    return {"protonet": protonet, "maml": maml}[method](images, shape, **options)


def ours(method: str, images: ClassImages, shape: Shape, **options: Any) -> tuple[Learner, Episodes]:
    """kshot's learner, and the episodes of a step."""
    batch = sample_episodes(images, shape, options.get("episodes", 1), seed=1, step=0)
    batch = batch.to(DEVICE, torch.get_default_dtype())
    if method == "protonet":
        return build("protonet", images.shape, backbone={"norm": options.get("norm", "running")}), batch
    settings = plain_maml(options["inner"], shape.ways, options["first_order"])
    return build("maml", images.shape, backbone={"norm": "batch"}, **settings), batch


def protonet(images: ClassImages, shape: Shape, norm: str = "running") -> dict[str, Step]:
    easyfsl, learn2learn, *_ = PEERS
    learner, batch = ours("protonet", images, shape, norm=norm)
    labels, targets = (
        torch.arange(shape.ways, device=DEVICE).repeat_interleave(n) for n in (shape.shots, shape.queries)
    )
    support, query = usual(batch.support[0]), usual(batch.query[0])
    networks = [plain(learner), plain(learner)]
    optimisers = [torch.optim.Adam(network.parameters(), 1e-3) for network in networks]

    def by_learn2learn() -> float:
        features = networks[0](torch.cat([support, query]))
        classifier = learn2learn.nn.PrototypicalClassifier(features[: len(support)], labels)
        return stepped(F.cross_entropy(classifier(features[len(support) :]), targets), optimisers[0])

    class Squared(easyfsl.methods.PrototypicalNetworks):  # its own distances are not, unlike the paper's
        def l2_distance_to_prototypes(self, samples: Tensor) -> Tensor:
            return -super().l2_distance_to_prototypes(samples).square()

    classifier = Squared(networks[1])

    def by_easyfsl() -> float:
        classifier.process_support_set(support, labels)
        return stepped(F.cross_entropy(classifier(query), targets), optimisers[1])

    return {"kshot": kshot_step(learner, batch), "learn2learn": by_learn2learn, "easyfsl": by_easyfsl}


def maml(images: ClassImages, shape: Shape, episodes: int, inner: int, first_order: bool) -> dict[str, Step]:
    _, learn2learn, higher, torchopt = PEERS
    learner, batch = ours("maml", images, shape, episodes=episodes, inner=inner, first_order=first_order)
    tasks = [(one.support.contiguous(), one.support_labels, one.query.contiguous(), one.query_labels) for one in batch]
    networks = [plain(learner, shape.ways) for _ in range(3)]
    optimisers = [torch.optim.Adam(network.parameters(), 1e-3) for network in networks]

    model = learn2learn.algorithms.MAML(networks[0], lr=RATE, first_order=first_order)

    def by_learn2learn() -> float:
        optimisers[0].zero_grad()
        total = 0.0
        for support, labels, query, targets in tasks:
            fast = model.clone()
            for _ in range(inner):
                fast.adapt(F.cross_entropy(fast(support), labels))
            loss = F.cross_entropy(fast(query), targets) / episodes
            loss.backward()
            total += loss.item()
        optimisers[0].step()
        return total

    descent = torch.optim.SGD(networks[1].parameters(), RATE)

    def by_higher() -> float:
        optimisers[1].zero_grad()
        total = 0.0
        for support, labels, query, targets in tasks:
            with higher.innerloop_ctx(
                networks[1], descent, copy_initial_weights=False, track_higher_grads=not first_order
            ) as (fast, differentiable):
                for _ in range(inner):
                    differentiable.step(F.cross_entropy(fast(support), labels))
                loss = F.cross_entropy(fast(query), targets) / episodes
                if first_order:  # without a graph, the gradient at the last weights is put at the first ones
                    last = torch.autograd.grad(loss, list(fast.parameters()))
                    for weight, gradient in zip(networks[1].parameters(), last, strict=True):
                        weight.grad = gradient if weight.grad is None else weight.grad + gradient
                else:
                    loss.backward()
                total += loss.item()
        optimisers[1].step()
        return total

    found = {"kshot": kshot_step(learner, batch), "learn2learn": by_learn2learn, "higher": by_higher}
    if first_order:  # torchopt has no switch for it
        return found
    inner_sgd = torchopt.MetaSGD(networks[2], lr=RATE)

    def by_torchopt() -> float:
        start = torchopt.extract_state_dict(networks[2], by="reference")
        moments = torchopt.extract_state_dict(inner_sgd)
        losses = []
        for support, labels, query, targets in tasks:
            for _ in range(inner):
                inner_sgd.step(F.cross_entropy(networks[2](support), labels))
            losses.append(F.cross_entropy(networks[2](query), targets))
            torchopt.recover_state_dict(networks[2], start)
            torchopt.recover_state_dict(inner_sgd, moments)
        return stepped(torch.stack(losses).mean(), optimisers[2])

    return {**found, "torchopt": by_torchopt}


def maml_evaluation(
    images: ClassImages, shape: Shape, episodes: int, peer_episodes: int, turn: int, inner: int
) -> dict[str, Step]:
    """On the very same episodes, queries normalised by their own batch."""
    learn2learn = PEERS[1]
    learner = build("maml", images.shape, backbone={"norm": "batch"}, **plain_maml(inner, shape.ways))
    model = learn2learn.algorithms.MAML(plain(learner, shape.ways), lr=RATE, first_order=True)

    def by_learn2learn() -> float:
        right = []
        for start in range(0, peer_episodes, 8):
            batch = sample_episodes(images, shape, 8, seed=turn + 1, step=start // 8, stream="test").to(DEVICE)
            for one in batch.part(0, peer_episodes - start):
                fast, support, query = model.clone(), usual(one.support), usual(one.query)
                for _ in range(inner):
                    fast.adapt(F.cross_entropy(fast(support), one.support_labels))
                with torch.no_grad():
                    right.append(float((fast(query).argmax(1) == one.query_labels).float().mean()))
        return 100 * float(np.mean(right))

    def by_kshot() -> float:
        return (
            100 * evaluate(learner, images, shape, episodes, seed=turn + 1, transductive=True, device=DEVICE).accuracy
        )

    return {"kshot": by_kshot, "learn2learn": by_learn2learn}


def protonet_evaluation(
    images: ClassImages, shape: Shape, episodes: int, peer_episodes: int, turn: int
) -> dict[str, Step]:
    easyfsl = PEERS[0]
    learner = build("protonet", images.shape, seed=turn + 1)  # other weights in each round, so that nothing is cached
    model = easyfsl.methods.PrototypicalNetworks(plain(learner))
    pixels = np.concatenate([images.gather(np.full(n, i), np.arange(n)) for i, n in enumerate(images.counts)])
    tensors = torch.from_numpy(pixels).float().div_(255)
    labels = np.arange(len(images)).repeat(images.counts).tolist()

    class InMemory(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(tensors)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return tensors[i], labels[i]

        def get_labels(self) -> list[int]:
            return labels

    sampler = easyfsl.samplers.TaskSampler(InMemory(), shape.ways, shape.shots, shape.queries, peer_episodes)
    loader = torch.utils.data.DataLoader(InMemory(), batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)

    def by_kshot() -> float:
        return 100 * evaluate(learner, images, shape, episodes, seed=turn + 1, device=DEVICE).accuracy

    def by_easyfsl() -> float:
        return 100 * easyfsl.utils.evaluate(model, loader, device=DEVICE, use_tqdm=False)

    return {"kshot": by_kshot, "easyfsl": by_easyfsl}


def kshot_step(learner: Learner, batch: Episodes) -> Step:
    """kshot's outer step as `meta_train` takes it."""
    shape = batch.shape
    optimiser = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], 1e-3)
    settings = Training(ways=shape.ways, shots=shape.shots, queries=shape.queries, episodes_per_step=len(batch))

    def step() -> float:
        learner.train()
        return float(learner_step(learner, batch, optimiser, settings))

    return step


def usual(images: Tensor) -> Tensor:
    """Images in the layout that torch makes unless it is asked for another, as the peers' examples have them."""
    return images.clone(memory_format=torch.contiguous_format)


def stepped(loss: Tensor, optimiser: torch.optim.Optimizer) -> float:
    value = loss.item()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return value


def build(
    name: str, image: tuple[int, int, int], backbone: dict[str, Any] | None = None, seed: int = 0, **options: Any
) -> Learner:
    torch.manual_seed(seed)
    recipe = Recipe(
        name="bench",
        dataset={"name": "bench"},
        backbone={"name": "conv4", "width": 64, **(backbone or {})},
        learner={"name": name, **options},
    )
    return recipe.build(image).to(DEVICE)


def plain_maml(inner: int, ways: int, first_order: bool = False) -> dict[str, Any]:
    """MAML's settings that make it what the peers compute: a zero head, and one rate for all weights.

    kshot takes the head's rate times the ways.
    """
    return {"head": "zero", "steps": inner, "rate": RATE, "head_rate": RATE / ways, "first_order": first_order}


def plain(learner: Learner, ways: int | None = None) -> nn.Sequential:
    """kshot's conv4 as torch's own modules, with the same weights; with a head of zeros for so many classes."""
    weights = [p.detach().clone() for p in learner.backbone.parameters()]
    blocks: list[nn.Module] = []
    for i in range(4):
        rest = [w for w in weights if w.dim() < 4]  # biases of convolutions and normalisations
        kernel = [w for w in weights if w.dim() == 4][i]
        conv, norm = nn.Conv2d(kernel.shape[1], 64, 3, padding=1), nn.BatchNorm2d(64)
        if ways is not None:
            norm = nn.BatchNorm2d(64, track_running_stats=False)
        with torch.no_grad():
            conv.weight.copy_(kernel)
            if len(rest) == 12:  # else normalisation makes up for it: its mean is taken away
                conv.bias.copy_(rest[3 * i])
            norm.weight.copy_(rest[-(8 - 2 * i) if len(rest) == 8 else 3 * i + 1])
            norm.bias.copy_(rest[-(7 - 2 * i) if len(rest) == 8 else 3 * i + 2])
        blocks += [conv, norm, nn.ReLU(), nn.MaxPool2d(2)]
    if ways is None:
        return nn.Sequential(*blocks, nn.Flatten()).to(DEVICE)
    head = nn.Linear(learner.backbone.features, ways)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*blocks, nn.Flatten(), head).to(DEVICE)


def classes(data: str, split: str) -> ClassImages:
    """A packed data set's classes and their quarter turns; or `noise`: 20 classes of 84 x 84 x 3."""
    if data != "noise":
        return ImageSet.open(data).split(split, rotations=True)
    random = np.random.default_rng(0)
    return ClassImages.from_arrays([random.integers(0, 256, (20, 3, 84, 84), np.uint8) for _ in range(20)])


@contextlib.contextmanager
def tuned(whether: bool) -> Iterator[None]:
    with malloc.kept() if whether else contextlib.nullcontext():
        yield


def seconds(step: Step) -> float:
    started = clock()
    step()
    return clock() - started


def clock() -> float:
    """Seconds: of this process on a CPU; on a GPU, of the clock once the GPU has done what was asked of it."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(main(json.loads(sys.argv[1]))))
