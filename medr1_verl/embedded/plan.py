"""How long the warm start is, and how noisy: what decides it besides the training rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from medr1_verl.embedded.demonstrations import CLEAN, Noise

BATCH = 32


@dataclass(frozen=True)
class Plan:
    """``clean`` steps on right demonstrations, then ``noisy`` steps on demonstrations with ``noise``."""

    seed: int = 0
    clean: int = 180
    noisy: int = 50
    noise: Noise = field(default_factory=Noise)

    def parts(self) -> tuple[Part, ...]:
        """The runs of verl's supervised trainer, in order; the ones without steps are left out."""
        both = (
            Part("clean", self.seed, self.clean, 0.01, CLEAN),
            Part("noisy", self.seed + 1_000_003, self.noisy, 0.005, self.noise),
        )
        return tuple(part for part in both if part.steps)


@dataclass(frozen=True)
class Part:
    """One run: ``steps`` batches of :data:`BATCH` rows, ``rate`` that of the matrices (``optimizer``)."""

    name: str
    seed: int
    steps: int
    rate: float
    noise: Noise

    def overrides(self) -> list[str]:
        """What the data set has to know, as arguments of verl's trainer (``lessons.Lessons`` reads them)."""
        fields = {"seed": self.seed, "steps": self.steps, **asdict(self.noise)}
        return [f"+data.lessons.{name}={value}" for name, value in fields.items()]
