"""Choosing the number of inner steps, with a learner whose answers are right after known numbers of them."""

import torch

from kshot import InnerLoop, LearnerConfig, class_means, squared_distances
from kshot.data.episodes import Shape
from kshot.selection import choose_steps
from kshot.testing import SIDE, Pixels, toy_images

RIGHT = {1: (3, 4), 2: (2,), 3: ()}  # after so many steps, by shots: at 3 it never is


class NearestForAWhile(InnerLoop):
    """Says the nearest class after the right number of steps, and the furthest before and beyond."""

    name = "nearest-for-a-while"
    steps = 1
    most_steps = 4

    def begin(self, support, labels, classes):
        assert not self.training
        shots = labels.shape[0] // classes.shape[0]
        right = torch.tensor([1.0 if taken in RIGHT[shots] else -1.0 for taken in range(5)])
        return {"means": class_means(self.embed(support), labels, classes), "right": right, "taken": torch.tensor(0)}

    def step(self, state, support, labels, classes, i):
        return {**state, "taken": i + 1}

    def classify(self, state, query):
        return -state["right"][state["taken"]] * squared_distances(self.embed(query), state["means"])


def test_each_number_of_shots_gets_the_fewest_steps_that_answer_best():
    """20 ways and 6 classes are 6 ways. Where all numbers are alike it is one step."""
    learner = NearestForAWhile(Pixels((1, SIDE, SIDE)), LearnerConfig()).train()
    shapes = [Shape(ways, shots, 2) for shots in (3, 1, 2) for ways in (5, 20)]
    assert choose_steps(learner, toy_images(classes=6), shapes, 5, seed=0) == {1: 3, 2: 2, 3: 1}
    assert learner.training
