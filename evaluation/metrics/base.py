"""The contract of a scorer, and the figures that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from data.types import Query, Record
from evaluation.protocols import Reply
from systems.base import ReleasedTruth, build_system
from utils.registry import Registry

if TYPE_CHECKING:  # intervals.py needs the type of an interval
    from evaluation.metrics.intervals import Statistics

STANDARD, RELEASED = "standard", "as_released"  # variants of a figure
AS_LISA = ReleasedTruth()

Interval = tuple[float, float]
Counts = dict[str, Any]  # of one image, as `json.dumps` and `json.loads` leave it unchanged


def released_truth(system: str | None) -> ReleasedTruth:
    """What the as-released figures of a system's predictions go by; None: the first paper's."""
    return build_system(system).released.truth if system else AS_LISA


@dataclass(frozen=True)
class Figure:
    """One number with everything that names it. value: a fraction, not per cent; None where nothing was counted.

    interval: 95 % interval over the choice of images; None where it is not estimated.
    """

    metric: str
    variant: str  # STANDARD or RELEASED
    value: float | None
    interval: Interval | None = None


class Scorer(Protocol):
    """Scores one suite: answers about an image become counts, and the counts of all images become figures.

    A suite is scored in four steps, of which only the first needs masks, data or a GPU:

        counts = Scorer.count(record, queries, replies, protocol)    one image, in the thread that writes predictions
        scorer.add(counts)                                           one scorer per suite and process
        scorer.merge(scorer_of_another_process)
        scorer.figures()

    Counts are plain JSON: they are part of each line of a prediction file, and `rescore` computes every figure from
    these lines again. So a scorer may keep only what counts say, never a mask. Figures must not depend on the order of
    `add` and `merge`, nor on how images are distributed over processes: an evaluation on eight GPUs, one that was
    interrupted and resumed, and a rescored file give the same numbers to the last bit. The scorers here reach this by
    keeping integers (pixels, answers) or by exactly rounded sums (`math.fsum`).
    """

    kinds: ClassVar[tuple[str, ...]]
    """The kinds of records (`Record.kind`) that it can score; `Suite.open` refuses others."""

    by_phrase: ClassVar[bool]
    """Whether each phrase of a question has one mask; else all masks of an answer count."""

    @staticmethod
    def count(
        record: Record,
        queries: Sequence[Query],
        replies: Sequence[Reply],
        protocol: str,
        released: ReleasedTruth = AS_LISA,
    ) -> Counts:
        """Counts of one image: `replies[i]` answers `queries[i]`, and all are about `record`.

        protocol: how the answers came about, as some figures need the model's own decisions. released: what the paper's
        released scoring compares with. Every scorer's counts have the key `unmatched`, the number of claims that name
        nothing the question is about. Raises ValueError where the record cannot be scored.
        """
        ...

    @staticmethod
    def needs_logits(queries: Sequence[Query], replies: Sequence[Reply], counts: Counts) -> bool:
        """Whether the as-released counts of these answers depend on logits, which binary masks do not have.

        The judge of predictions then sets `by_logits` in the counts, and the as-released figures are None.
        """
        ...

    def add(self, counts: Counts) -> None:
        """Takes over the counts of one image."""
        ...

    def merge(self, other: Self) -> None:
        """Takes over all that the scorer of another process has added."""
        ...

    def figures(self) -> list[Figure]:
        """Every figure of what was added; the first is the suite's main one. The same names also without any image."""
        ...

    def statistics(self) -> list[Statistics]:
        """Every figure of the standard variant as a function of sums over the images, in the order of `add`."""
        ...

    def details(self) -> dict[str, Any]:
        """What results.json holds in addition, as JSON: IoU per class, numbers of misses and extras, and the like."""
        ...


SCORERS: Registry[type[Scorer]] = Registry("metric kind")


def with_intervals(figures: Sequence[Figure], statistics: Sequence[Statistics]) -> list[Figure]:
    """The figures, those of the standard variant with their intervals."""
    intervals: Mapping[str, Interval | None] = {
        name: interval for statistic in statistics for name, interval in statistic.intervals().items()
    }
    return [
        replace(figure, interval=intervals.get(figure.metric))
        if figure.variant == STANDARD and figure.value is not None
        else figure
        for figure in figures
    ]
