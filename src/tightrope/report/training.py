"""What a run's metrics show: accuracies, losses, schedules and layers, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tightrope.report import figures
from tightrope.report.figures import Plot
from tightrope.report.read import Epoch
from tightrope.report.text import eps_text


def training_plots(epochs: Sequence[Epoch], key: str) -> Iterator[Plot]:
    """A plot for everything that the epochs note; `key` begins the plots' ids."""
    if any(epoch.get("held_out") for epoch in epochs):
        ending = _last_held_out(epochs)
        svg = figures.accuracies({"": epochs}, f"{key}-accuracies", f"Accuracies by epoch. {ending}")
        yield Plot(
            "Held-out accuracy",
            svg,
            f"{ending} These are training examples set aside and never trained on; they guide decisions "
            "during training. Certified accuracy here comes from the method's quickest bounds, in float32: "
            "it is a progress indicator, not a verdict.",
        )
    if any("stage" in epoch for epoch in epochs):
        yield layerwise({"": epochs}, f"{key}-stages")
    if any(epoch.get("losses") for epoch in epochs):
        yield Plot(
            "Losses",
            figures.losses(epochs, f"{key}-losses", "Loss and weight of each term by epoch."),
            "One line for each term of the training objective. A robust loss that rises while eps grows is "
            "expected; one that stays near ln(number of classes) means that the network learns nothing it "
            "can prove. A term with weight zero is measured but does not train the network.",
        )
    if any(epoch.get("eps") is not None or epoch.get("lr") is not None for epoch in epochs):
        yield Plot(
            "Schedules",
            figures.schedules(epochs, f"{key}-schedules", "Training eps and learning rate by epoch."),
            "Certified training raises eps slowly. The learning rate should not fall before eps has reached "
            "its final value.",
        )
    yield from _notes(epochs, key)
    if any(epoch.get("layers") for epoch in epochs):
        yield Plot(
            "Layers",
            figures.layers(
                epochs,
                f"{key}-layers",
                "Unstable share, dead share and mean bound width of each layer by epoch.",
            ),
            "A neuron is unstable when its bounds lie on both sides of zero: each one loosens the proof. It "
            "is dead when it is zero for every allowed input: many dead neurons waste capacity. Bounds that "
            "stay narrow towards the output are what certified training works for.",
        )


def _notes(epochs: Sequence[Epoch], key: str) -> Iterator[Plot]:
    """Plots of what only some methods and modifiers note."""
    notes = {name for epoch in epochs for name in epoch.get("notes", {})}
    if "agree" in notes:
        yield Plot(
            "How the two gradients are combined",
            figures.combination(
                epochs,
                f"{key}-combination",
                "Shares of steps led by both gradients, the adversarial or the robust one; cosine and FOSC; "
                "the two gradients' coefficients, by epoch.",
            ),
            "Where the averaged gradients of the adversarial and the robust loss agree (cosine above zero), "
            "both lead: the step goes between them. Where they do not, one leads, less what would undo the "
            "other: the adversarial one if the attack is strong, that is, if FOSC (zero where no step "
            "improves the attack; measured in these steps only) is at most a threshold, else the robust one. "
            "The coefficients are what the two gradients are multiplied by before they are added.",
        )
    words = []
    if "mean radius" in notes:
        words.append(
            "Examples that cannot be proved are trained at less than the schedule's eps: the further the "
            "mean radius stays below it, the more there are, or the more hopeless they are. While eps grows, "
            "part of the gap is only that eps is an epoch's last and the radius a mean over the epoch."
        )
    if any(name.startswith(figures.SHARE) for name in notes):
        words.append(
            "The effective share is how many of a batch's examples count after weighting, (Σw)² / (n Σw²): "
            "100 % where all count alike; close to zero, a few examples drown out the others."
        )
    if words:
        yield Plot(
            "Single examples",
            figures.single_examples(
                epochs, f"{key}-examples", "Training radius and effective share of the examples by epoch."
            ),
            " ".join(words),
        )


def layerwise(runs: Mapping[str, Sequence[Epoch]], key: str) -> Plot:
    """Verified error by epoch of runs that were trained layer by layer."""
    held_out = {label or "this run": epochs[-1].get("held_out") for label, epochs in runs.items()}
    ends = "; ".join(
        f"{label} {100 * found['verified_error']:.1f} %"
        for label, found in held_out.items()
        if found and "verified_error" in found
    )
    alt = f"Verified error and clean accuracy by epoch. Verified error at the end: {ends}."
    return Plot(
        "Layer by layer",
        figures.stages(runs, key, alt),
        "Verified error is the share of right answers on held-out training examples that an attack turns "
        "inside the latent region that the run is working on; it is an estimate, not a proof. Dashed lines "
        "are where a stage ends: the region moves one layer on, and the layers before it are frozen. Across "
        "a line the attack is another one, so compare within a stage.",
    )


def _last_held_out(epochs: Sequence[Epoch]) -> str:
    epoch, held_out = next(
        (epoch["epoch"], found) for epoch in reversed(epochs) if (found := epoch.get("held_out"))
    )
    words = f"After epoch {epoch}: clean {100 * held_out['clean']:.1f} %"
    certified = held_out.get("certified")
    if certified is not None:
        words += f", certified {100 * certified:.1f} %"
        words += f" at eps {eps_text(held_out['eps'])}" if "eps" in held_out else ""
    return words + (f", on {held_out['examples']:,} examples." if "examples" in held_out else ".")
