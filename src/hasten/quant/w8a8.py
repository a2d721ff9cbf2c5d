"""Linear layers in 8-bit integers: weights once, activations as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.kernels.int8_linear import Activations, int8_linear, pack, quantize_rows, unpack
from hasten.method import Method, Part, Refused, Stage, in_memory
from hasten.patch import Patch

VECTORS = ("norm", "emb")  # modulation and time layers see one vector an image: too few rows to gain


class Int8Linear(nn.Module):
    """Stands in for a linear layer: [..., I] -> [..., O] in the precision of its input.

    It has no `weight` and shares the bias with the layer that it replaces. A cast leaves its numbers alone; a move to
    another device packs them anew.

    Attributes:
        packed: int8 weights, I * O bytes, laid out for their device.
        scale: [O, 1] float32.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, activations: Activations = "token") -> None:
        super().__init__()
        self.in_features, self.out_features, self.activations = linear.in_features, linear.out_features, activations
        q_OI, scale_O1 = quantize_rows(linear.weight.detach())
        self.register_buffer("packed", pack(q_OI), persistent=False)
        self.register_buffer("scale", scale_O1, persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.packed, self.scale, self.bias, self.activations)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, activations={self.activations}"

    def get_extra_state(self) -> dict[str, Tensor]:
        return {"q": unpack(self.packed, self.out_features, self.in_features), "scale": self.scale}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.packed, self.scale = pack(state["q"].to(self.scale.device)), state["scale"].to(self.scale.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        packed, scale = self._buffers.pop("packed"), self._buffers.pop("scale")
        assert packed is not None
        assert scale is not None
        super()._apply(fn, recurse)  # the bias alone
        to = fn(scale).device
        if to != scale.device:
            packed = pack(unpack(packed, self.out_features, self.in_features).to(to))
        self._buffers.update(packed=packed, scale=scale.to(to))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A packed tensor can be neither copied nor pickled: what is written is int8 in rows."""
        plain = self._buffers | {"packed": unpack(self.packed, self.out_features, self.in_features)}
        return vars(self) | {"_buffers": plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = pack(self.packed)


class W8A8(Method):
    """The blocks' linears with int8 weights, a scale a row, and int8 activations, a scale a token; sums are int32.

    Half the weight bytes of bfloat16, and twice its multiplications a cycle on CPUs with VNNI or AMX; a relative error
    of about 1 % a layer on normal data. Layers that see one vector an image (modulation, time) stay. The original
    layers wait, whole, until removal. Dettmers et al. 2022, arXiv:2208.07339 section 2.1.

    Args:
        activations: one scale for each token, or one for all tokens of a call: a little faster, and less exact where
            tokens differ in size.
        smallest: layers with fewer input or output features than this stay as they are. At 1024 tokens, uncompiled,
            int8 loses to bfloat16 at 192 by 192, is near it at 256 and gains from 384 on (benchmarks/int8_linear.py).
    """

    stage: ClassVar = Stage.QUANTIZE
    writes: ClassVar = frozenset({Part.LINEARS})
    systems: ClassVar = ("w8a8",)

    activations: Activations = "token"
    smallest: int = Field(256, ge=1, le=65536, json_schema_extra={"low": 64, "high": 256, "log": True})

    def apply(self, model: nn.Module) -> Patch:
        """Raises Refused on a device without fast int8, and where no layer is large enough."""
        in_memory(self, model)
        with Patch() as patch:
            for name, linear in list(anatomy(model).linears()):
                if self._takes(name, linear):
                    patch.swap(model, name, Int8Linear(linear, self.activations))
            if not patch.sites:
                raise Refused(
                    f"quant.w8a8 found no linear layer of {self.smallest} features or more in the blocks of"
                    f" {type(model).__name__}: lower `smallest`, or leave the method out"
                )
            return patch.keep()

    def _takes(self, name: str, linear: nn.Linear) -> bool:
        return min(linear.in_features, linear.out_features) >= self.smallest and not any(v in name for v in VECTORS)
