"""Settings of the guards of a run; imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Protection of a run against bad batches and bad hardware."""

    sigma_factor: float = 6.0
    """Skip an update whose loss or log gradient norm is this many standard deviations above the
    mean of the updates before; 0 = never."""
    window: int = 128
    """Updates in the mean; none is skipped before half a window."""
    rewind_after: int = 10
    """Consecutive skipped updates that cause a rewind to the last checkpoint; their data is then
    left out."""
    compare_every: int = 100
    """Steps between comparisons of the replicas' weights; 0 = only before a save."""
    min_codebook_usage: float = 0.0
    """Stop a dVAE if a validation uses a smaller fraction of its codes; 0 = never. Below a tenth
    there is always a warning."""
    codebook_usage_after: float = 0.25
    """Fraction of the run after which codebook usage is checked."""

    def problems(self) -> list[str]:
        problems = []
        if not self.sigma_factor >= 0 or self.compare_every < 0:
            problems.append(
                "guard.sigma_factor and guard.compare_every must not be negative; 0 = off"
            )
        if self.window < 16:
            problems.append(f"guard.window={self.window} is too short for a deviation; try 128")
        if self.rewind_after < 1:
            problems.append("guard.rewind_after must be at least 1")
        if not (0 <= self.min_codebook_usage <= 1 and 0 <= self.codebook_usage_after <= 1):
            problems.append(
                "guard.min_codebook_usage and guard.codebook_usage_after are fractions: 0 to 1"
            )
        return problems

    def without_codes(self) -> list[str]:
        """Problems of a stage that has no codebook."""
        return (
            ["guard.min_codebook_usage: only a dVAE has codes; set --guard.min-codebook-usage 0"]
            if self.min_codebook_usage
            else []
        )
