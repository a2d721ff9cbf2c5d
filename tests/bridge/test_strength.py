"""Image-to-image, inpainting and refiners: pipelines that start in the middle of the times, or end there."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import hasten
from families import ask
from hasten import Recipe, tree
from hasten.bridge.scheduler import SolverScheduler
from hasten.solvers.drive import visited
from pipelines import PIPELINES

SOLVERS = tree.functions("solvers")
FIT = sorted(n for n, s in SOLVERS.items() if not s.unfit and not s.fitted)
NAMED = {f.name: f for f in PIPELINES}


def other(name: str, kind: Any) -> tuple[Any, dict[str, Any]]:
    """Another pipeline of a family's parts, and its inputs; half of the picture is to be painted anew where it asks."""
    family, inpaints = NAMED[name], "Inpaint" in kind.__name__
    further = {"requires_safety_checker": False} if name == "sd" else {}
    pipe = kind(**family.build().components, **further)
    pipe.set_progress_bar_config(disable=True)
    size = () if inpaints or name == "flux" else ("height", "width")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    mask = torch.cat([torch.zeros(1, 1, 32, 16), torch.ones(1, 1, 32, 16)], -1)
    given = {k: v for k, v in family.inputs().items() if k not in size} | {"image": picture}
    return pipe, given | ({"mask_image": mask} if inpaints else {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd", "StableDiffusionImg2Img"),
        ("sd", "StableDiffusionInpaint"),
        ("sdxl", "StableDiffusionXLImg2Img"),
        ("sdxl", "StableDiffusionXLInpaint"),
        ("sd3", "StableDiffusion3Img2Img"),
        ("flux", "FluxImg2Img"),
    ],
)
def test_from_the_middle_of_its_own_times_a_pipelines_own_sample_comes_out(name: str, kind: str) -> None:
    pipe, given = other(name, getattr(diffusers, f"{kind}Pipeline"))
    given |= {"strength": 0.5}
    theirs = ask(pipe, **given, generator=torch.Generator().manual_seed(0))
    with hasten.accelerate(pipe, Recipe(solver="ddim")) as handle:
        ours = ask(pipe, **given, generator=torch.Generator().manual_seed(0))
        assert handle.clock is not None
        assert handle.clock.calls == 3 * NAMED[name].calls
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_refiner_goes_on_where_the_base_ended() -> None:
    """SDXL's two halves, each with a solver of hasten in it: the same as each with its own scheduler."""
    first, second = NAMED["sdxl"].build(), other("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline)[0]
    given = NAMED["sdxl"].inputs() | {"num_inference_steps": 10}

    def both() -> torch.Tensor:
        half = ask(first, **given, denoising_end=0.5, generator=torch.Generator().manual_seed(0))
        rest = {k: v for k, v in given.items() if k not in ("height", "width")}
        return ask(second, **rest, image=half, denoising_start=0.5, generator=torch.Generator().manual_seed(0))

    theirs = both()
    with hasten.accelerate(first, Recipe(solver="ddim")), hasten.accelerate(second, Recipe(solver="ddim")):
        ours = both()
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


IRREGULAR = [{"pndm": {"warmup": w}} for w in ("plms", "prk")]  # more calls a step at their start than later


@pytest.mark.parametrize("solver", [*FIT, *IRREGULAR], ids=str)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_image_to_image_starts_at_its_strength(solver: Any, strength: float) -> None:
    """From there the calls are those of the grid's rest; a solver that can't start there says so before the first."""
    pipe, inputs = other("sd3", diffusers.StableDiffusion3Img2ImgPipeline)
    recipe = Recipe.from_dict({"solver": solver, "grid": "uniform", "steps": 5})
    given = inputs | {"num_inference_steps": 5, "strength": strength, "generator": torch.Generator().manual_seed(0)}
    with hasten.accelerate(pipe, recipe) as handle:
        assert handle.clock is not None
        if solver in IRREGULAR and strength < 1:
            with pytest.raises(ValueError, match="take strength 1, or another solver"):
                ask(pipe, **given)
            assert handle.clock.calls == 0
        else:
            ask(pipe, **given)
            rest = pipe.scheduler.grid.since(5 - int(5 * strength))
            assert handle.clock.calls == len(visited(recipe.solving(), rest))


def test_image_to_image_noises_to_the_first_node() -> None:
    bases = [NAMED[name].build().scheduler for name in ("sd3", "sd", "svd", "stable_audio")]
    for base in [*bases, diffusers.EDMEulerScheduler(sigma_data=0.3)]:
        scheduler = SolverScheduler(base, SOLVERS["ddim"])
        scheduler.set_timesteps(4)
        x, eps = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0)
        assert scheduler.grid is not None
        node, unit = scheduler.grid.nodes[1], scheduler.process.unit
        got = scheduler.scale_noise(x, scheduler.timesteps[1].expand(2), eps)
        assert torch.allclose(got, node.alpha * x / unit + node.sigma * eps, atol=1e-5)
        assert torch.equal(scheduler.add_noise(x, eps, scheduler.timesteps[1].expand(2)), got)
