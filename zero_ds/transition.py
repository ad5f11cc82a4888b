from dataclasses import dataclass
@dataclass(frozen=True)
class Transition:
    layer: int | None
    verdict: str
