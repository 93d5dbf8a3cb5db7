"""Code books: values that are not evenly spaced, shared by blocks of weights that each have a scale.

A weight is the number of a value in the book, times its block's largest magnitude (Dettmers and Zettlemoyer 2022,
https://arxiv.org/abs/2212.09720; NF4 and double quantization: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
Blocks run over the matrix in reading order and may cross rows. Every book lies in [-1, 1] and holds 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import ConfigError
from methods.quantization.grids import Scales
from methods.quantization.linear import PackedLinear
from methods.quantization.packing import pack, unpack, words

if TYPE_CHECKING:
    from methods.quantization.activations import InputGrid

Kind = Literal["int", "float", "dynamic", "quantile", "nf4", "fp4"]
KINDS = ("int", "float", "dynamic", "quantile", "nf4", "fp4")
NF4_OFFSET = 1 - (1 / 30 + 1 / 32) / 2  # quantile of the outermost value; QLoRA's code
FP4_VALUES = (0.0, 0.00520833, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)  # bitsandbytes' table
SCALE_BLOCK = 256  # scales that share a second scale; QLoRA, Section 3


@dataclass(frozen=True)
class CodebookGrid:
    """2^bits values in [-1, 1] and a scale for each block.

    kind: "int" evenly spaced; "float" sign, exponent and mantissa; "dynamic" exponent of varying length;
        "quantile" the quantiles of the weights themselves; "nf4" those of a normal distribution; "fp4" bitsandbytes'.
    bits: 2 to 8; 4 for nf4 and fp4.
    group_size: weights in a block.
    exponent_bits: of "float"; None is the paper's rule, half of the bits, rounded up.
    double_quantization: keep the scales in 8 bits, with a second scale for every 256 and their mean.
    scale_rule: "power_of_two" rounds the scales of "float" up to powers of two, so that casting to a wider float is a
        shift of bits; "row_power_of_two" keeps the largest of a row and the others at powers of two below it
        (ZeroQuant-FP, Section 4, M1 and M2). No weight is clipped by that.
    """

    kind: Kind
    bits: int
    group_size: int = 64
    exponent_bits: int | None = None
    double_quantization: bool = False
    scale_rule: Literal["free", "power_of_two", "row_power_of_two"] = "free"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"grid.kind={self.kind}: choose one of {', '.join(KINDS)}")
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits}: a code book has 2 to 8 bits; use method=dense for 16")
        if self.kind in ("nf4", "fp4") and self.bits != 4:
            raise ConfigError(f"bits={self.bits}: {self.kind} has 4 bits; grid.kind=quantile or float have others")
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ConfigError(f"grid.group_size={self.group_size}: a block holds at least 2 weights")
        if self.exponent_bits is not None and (self.kind != "float" or not 1 <= self.exponent_bits < self.bits):
            raise ConfigError(
                f"grid.exponent_bits={self.exponent_bits}: floats of {self.bits} bits have 1 to {self.bits - 1}; null "
                "for half of the bits, rounded up"
            )

        rules = ("free", "power_of_two", "row_power_of_two")
        if self.scale_rule not in rules:
            raise ConfigError(f"grid.scale_rule={self.scale_rule}: choose one of {', '.join(rules)}")
        if self.scale_rule != "free" and (self.kind != "float" or self.double_quantization):
            raise ConfigError(f"grid.scale_rule={self.scale_rule}: for grid.kind=float without double quantization")

    def width(self, columns: int) -> int:
        """Input channels per block, where blocks do not cross rows."""
        return min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Blocks per row, where they do not cross rows."""
        return -(-columns // self.width(columns))

    def check(self, name: str, columns: int) -> None:
        """Any matrix can be cut into blocks."""

    def book(self, weight: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, ascending, float32 [at most 2^bits]; "quantile" takes them from `weight`, in `dtype`."""
        if self.kind == "quantile":
            return _quantile_book(self._blocked(weight), self.bits).to(dtype).float()
        return fixed_book(self.kind, self.bits, self.exponent_bits).to("cpu" if weight is None else weight.device)

    def fit(self, weight: Tensor, dtype: torch.dtype, limit: Tensor | None = None) -> Scales:
        """The largest magnitude of every block of `weight` [R, C], as it is stored.

        limit: clip blocks to at most this magnitude; of the scales' shape.
        """
        largest = self.group_maximum(weight)
        if limit is not None:
            largest = torch.minimum(largest, limit)
        if self.scale_rule != "free":
            largest = self._powers_of_two(largest.float(), torch.finfo(dtype).smallest_normal)
        kind = torch.finfo(dtype)
        stored: dict[str, Tensor] = {}
        if self.double_quantization:
            scale, stored = _double_quantized(largest.float())
        else:
            scale = largest.to(dtype).clamp(min=kind.smallest_normal * kind.eps)
        if self.kind == "quantile":
            stored["weight_book"] = self.book(weight, dtype).to(dtype)
        return Scales(scale, None, stored)

    def group_maximum(self, weight: Tensor) -> Tensor:
        """Largest |w| of each block: [R, C / group_size] where blocks do not cross rows, else [1, blocks]."""
        largest = self._blocked(weight).abs().amax(1)
        return largest.view(len(weight) if weight.shape[1] % self.group_size == 0 else 1, -1)

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Numbers of the nearest values of `weight` [R, C], uint8."""
        scaled = self._blocked(weight) / scales.scale.reshape(-1, 1).to(weight.dtype)
        return self._unblocked(_nearest(scaled, self._book_of(scales, weight)).to(torch.uint8), weight.shape)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
        """What codes [R, C] mean, in `dtype`."""
        book = self._book_of(scales, codes).to(dtype)
        values = book[self._blocked(codes).long()] * scales.scale.reshape(-1, 1).to(dtype)
        return self._unblocked(values, codes.shape)

    def round(self, weight: Tensor, scales: Scales) -> Tensor:
        """`weight` [R, C] moved to the nearest values."""
        return self.decode(self.encode(weight, scales), scales, weight.dtype)

    def round_scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        """Values of any shape moved to the nearest of the book times `scale`, which broadcasts; not for "quantile"."""
        book = self.book().to(values.device, values.dtype)
        return book[_nearest(values / scale, book)] * scale

    def layer(self) -> type[CodebookLinear]:
        """The class of layers that store weights on this grid."""
        return CodebookLinear

    def _powers_of_two(self, largest: Tensor, least: float) -> Tensor:
        """Block maxima [R, G] raised so that scales, in units of the float's own largest value, obey `scale_rule`."""
        top = float(_float_magnitudes(*self._float_bits()).max())
        scale = (largest / top).clamp(min=least)
        if self.scale_rule == "power_of_two":
            return top * torch.exp2(scale.log2().ceil())
        row = scale.amax(1, keepdim=True)
        return top * row / torch.exp2((row / scale).log2().floor())

    def _float_bits(self) -> tuple[int, int]:
        """Exponent and mantissa bits."""
        exponent = self.exponent_bits or -(-self.bits // 2)
        return exponent, self.bits - 1 - exponent

    def _book_of(self, scales: Scales, like: Tensor) -> Tensor:
        own = scales.stored.get("weight_book")
        return self.book().to(like.device) if own is None else own.float()

    def _blocked(self, weight: Tensor) -> Tensor:
        """[R, C] -> [blocks, group_size]; a short last block is filled up with zeros."""
        flat = weight.reshape(-1)
        return functional.pad(flat, (0, -len(flat) % self.group_size)).view(-1, self.group_size)

    def _unblocked(self, blocked: Tensor, shape: torch.Size) -> Tensor:
        return blocked.reshape(-1)[: shape.numel()].view(shape)


BITSANDBYTES = "packed (bitsandbytes)"
BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BITSANDBYTES_FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12  # by code


def _bitsandbytes_multiplies(device: str, dtype: torch.dtype, columns: int, grid: CodebookGrid) -> bool:
    """Whether bitsandbytes has a kernel for products with weights of this grid on this platform, and is there.

    It takes 16-bit inputs on CUDA, and blocks that do not cross rows.
    """
    return (
        device == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and grid.kind in ("nf4", "fp4")
        and grid.group_size in BITSANDBYTES_BLOCKS
        and columns % grid.group_size == 0
        and find_spec("bitsandbytes") is not None
    )


@cache
def fixed_book(kind: str, bits: int, exponent_bits: int | None = None) -> Tensor:
    """The values of a book that does not depend on the weights, ascending, float32."""
    if kind == "int":
        top = 2 ** (bits - 1) - 1
        return torch.arange(-top, top + 1) / top
    if kind == "float":
        exponent = exponent_bits or -(-bits // 2)
        return _both_signs(_float_magnitudes(exponent, bits - 1 - exponent))
    if kind == "dynamic":
        return _dynamic_book(bits)
    if kind == "nf4":
        return _normal_book()
    return _both_signs(torch.tensor(FP4_VALUES))


def _both_signs(magnitudes: Tensor) -> Tensor:
    """0 and the other magnitudes with either sign, the largest of them 1."""
    positive = magnitudes[magnitudes > 0] / magnitudes.max()
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def _float_magnitudes(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Every magnitude of a float without infinities: subnormals below 1, then 1.m · 2^e."""
    fractions = torch.arange(2**mantissa_bits) / 2**mantissa_bits
    powers = torch.exp2(torch.arange(2**exponent_bits - 1).float())
    return torch.cat([fractions, ((1 + fractions) * powers[:, None]).flatten()])


def _dynamic_book(bits: int) -> Tensor:
    """Leading zeros are powers of ten, the bits after the first one a linear fraction; and 0 and 1 (not -1)."""
    digits = bits - 1
    magnitudes = []
    for fraction_bits in range(digits):
        edges = torch.linspace(0.1, 1, 2**fraction_bits + 1)
        magnitudes.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (fraction_bits - digits + 1))
    positive = torch.cat(magnitudes)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


def _normal_book() -> Tensor:
    """Quantiles of the normal distribution, eight above zero and seven below: QLoRA, Section 3, Equation 4."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    positive = normal.icdf(torch.linspace(NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = normal.icdf(torch.linspace(NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    book = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (book / book.abs().max()).float()


def _quantile_book(blocked: Tensor, bits: int) -> Tensor:
    """2^bits - 1 evenly spread quantiles of the scaled weights, stretched to ±1, and 0; as bitsandbytes made it.

    Every code stands for about as many weights: the middle of each of 2^bits - 1 equal shares.
    """
    scaled = blocked / blocked.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ordered = scaled.flatten().float().sort().values
    count = 2**bits - 1
    shares = (torch.arange(count, device=blocked.device) + 0.5) / count
    quantiles = ordered[(shares * (len(ordered) - 1)).round().long()]
    book = quantiles / quantiles.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([book, book.new_zeros(1)]).sort().values


def _nearest(values: Tensor, book: Tensor) -> Tensor:
    """Numbers of the nearest values of an ascending book, int64."""
    book = book.to(values.dtype)
    return torch.bucketize(values, (book[1:] + book[:-1]) / 2)


def _double_quantized(largest: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales as 8 bits give them back, and what is stored for that: codes, a scale for every 256, the mean."""
    mean = largest.mean()
    centred = functional.pad((largest - mean).flatten(), (0, -largest.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    second = centred.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    codes = _nearest(centred / second[:, None], fixed_book("dynamic", 8).to(largest.device)).to(torch.uint8)
    stored = {
        "scale_codes": codes.flatten()[: largest.numel()].clone(),
        "scale_scale": second,
        "scale_mean": mean.view(1),
    }
    return _scales_from(stored).view(largest.shape), stored


def _scales_from(stored: dict[str, Tensor]) -> Tensor:
    """The inverse of what `_double_quantized` stores: float32 [blocks]."""
    codes = stored["scale_codes"]
    values = fixed_book("dynamic", 8).to(codes.device)[codes.long()]
    return values * stored["scale_scale"].repeat_interleave(SCALE_BLOCK)[: len(codes)] + stored["scale_mean"]


class CodebookLinear(PackedLinear):
    """A PackedLinear whose weights are numbers of values in a book.

    Buffers: `weight_packed` int32 [words], the codes in reading order; `weight_scale` [blocks], or with double
    quantization `scale_codes` uint8 [blocks], `scale_scale` float32 [⌈blocks / 256⌉] and `scale_mean` float32 [1];
    `weight_book` [2^bits] where the book comes from the weights; `bias`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: Kind,
        bits: int,
        group_size: int,
        exponent_bits: int | None = None,
        double_quantization: bool = False,
        scale_rule: str = "free",
        bias: bool = False,
        scale_dtype: str = "float16",
        inputs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_dtype, inputs)
        self.grid = CodebookGrid(kind, bits, group_size, exponent_bits, double_quantization, scale_rule)
        count = in_features * out_features
        blocks = -(-count // group_size)
        self.register_buffer("weight_packed", torch.empty(words(count, bits), dtype=torch.int32))
        if double_quantization:
            self.register_buffer("scale_codes", torch.empty(blocks, dtype=torch.uint8))
            self.register_buffer("scale_scale", torch.empty(-(-blocks // SCALE_BLOCK), dtype=torch.float32))
            self.register_buffer("scale_mean", torch.empty(1, dtype=torch.float32))
        else:
            self.register_buffer("weight_scale", torch.empty(blocks, dtype=self.scale_dtype))
        if kind == "quantile":
            self.register_buffer("weight_book", torch.empty(2**bits, dtype=self.scale_dtype))
        self.register_buffer("operand", None, persistent=False)
        self.register_buffer("operand_scale", None, persistent=False)
        self.register_buffer("operand_book", None, persistent=False)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The weight's buffers."""
        scales = ("scale_codes", "scale_scale", "scale_mean") if self.grid.double_quantization else ("weight_scale",)
        return ("weight_packed", *scales, *(("weight_book",) if self.grid.kind == "quantile" else ()))

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scales: Scales,
        grid: CodebookGrid,
        inputs: InputGrid | None = None,
        input_scale: Tensor | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> CodebookLinear:
        """See `pack_linear`. scale_dtype: of the bias, where double quantization leaves no 16-bit scale to tell."""
        rows, columns = codes.shape
        narrow = scale_dtype or (torch.float16 if grid.double_quantization else scales.scale.dtype)
        made = cls(
            columns,
            rows,
            grid.kind,
            grid.bits,
            grid.group_size,
            grid.exponent_bits,
            grid.double_quantization,
            grid.scale_rule,
            bias=linear.bias is not None,
            scale_dtype=str(narrow).removeprefix("torch."),
            inputs=None if inputs is None else inputs.as_dict(),
        )
        made.weight_packed = pack(codes.reshape(1, -1), grid.bits)[0]
        if not grid.double_quantization:
            made.weight_scale = scales.scale.reshape(-1).clone()
        for name, tensor in scales.stored.items():
            setattr(made, name, tensor.clone())
        made.take_over(linear, input_scale)
        return made

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        return {
            **self.common_spec(),
            "kind": self.grid.kind,
            "bits": self.grid.bits,
            "group_size": self.grid.group_size,
            "exponent_bits": self.grid.exponent_bits,
            "double_quantization": self.grid.double_quantization,
            "scale_rule": self.grid.scale_rule,
        }

    def compressed_tensors_scheme(self) -> None:
        """Its formats hold integers and standard floats only."""

    def decode_operand(self, dtype: torch.dtype) -> bool:
        """What bitsandbytes multiplies, where it is installed and there is a GPU: the same codes and float32 scales."""
        device = self.weight_packed.device
        if self.inputs is not None or not _bitsandbytes_multiplies(device.type, dtype, self.in_features, self.grid):
            return False
        tensors = self.bitsandbytes()[1]
        self.operand = tensors["weight"].contiguous()
        self.operand_scale = self.scales().scale.flatten().float().contiguous()  # in one level, also of two
        self.operand_book = tensors["weight.quant_map"].to(device)
        self.kernel = f"{self.grid.kind} {BITSANDBYTES}"
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without bias, by bitsandbytes."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x.contiguous(), self.operand.t(), self.bitsandbytes_state(x.dtype))

    def bitsandbytes_state(self, dtype: torch.dtype) -> Any:
        """What bitsandbytes must know about the operand: its QuantState, for products in `dtype`."""
        from bitsandbytes.functional import QuantState

        return QuantState(
            self.operand_scale,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.operand_book,
            blocksize=self.grid.group_size,
            quant_type=self.grid.kind,
            dtype=dtype,
        )

    def drop_operand(self) -> None:
        """Forget the operand."""
        self.operand = self.operand_scale = self.operand_book = None

    def bitsandbytes(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Its configuration and tensors of the same weights in bitsandbytes; None where it has no such type."""
        if self.grid.kind not in ("nf4", "fp4") or self.grid.group_size not in BITSANDBYTES_BLOCKS:
            return None
        nested = self.grid.double_quantization
        table = BITSANDBYTES_FP4 if self.grid.kind == "fp4" else self.grid.book()
        order = (self.grid.book()[:, None] - table[None]).abs().argmin(1)  # ours are ascending
        codes = self.codes()
        codes = order.to(codes.device, torch.uint8)[codes.flatten().long()]
        pairs = functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        state = {
            "quant_type": self.grid.kind,
            "blocksize": self.grid.group_size,
            "dtype": str(self.scale_dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        tensors = {
            "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
            "weight.quant_map": table.clone(),
            "weight.absmax": self.scale_codes if nested else self.weight_scale.float(),
        }
        if nested:
            state |= {
                "nested_blocksize": SCALE_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(self.scale_mean),
            }
            tensors |= {
                "weight.nested_absmax": self.scale_scale,
                "weight.nested_quant_map": fixed_book("dynamic", 8).clone(),
            }
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{self.grid.kind}"] = text
        if self.bias is not None:
            tensors["bias"] = self.bias
        config = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.grid.kind,
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": state["dtype"],
            "bnb_4bit_quant_storage": "uint8",
        }
        return config, tensors

    def codes(self) -> Tensor:
        """Numbers of the values, uint8 [out, in]."""
        self.require_packed()
        flat = unpack(self.weight_packed[None], self.grid.bits, self.weight_count)
        return flat.view(self.out_features, self.in_features)

    def scales(self) -> Scales:
        """Scale of every block, and the book where it is stored."""
        self.require_packed()
        stored = {"weight_book": self.weight_book} if self.grid.kind == "quantile" else {}
        if not self.grid.double_quantization:
            return Scales(self.weight_scale, None, stored)
        parts = {name: getattr(self, name) for name in ("scale_codes", "scale_scale", "scale_mean")}
        return Scales(_scales_from(parts), None, stored)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] as numbers: computed in float32, rounded once to `dtype`."""
        return self.grid.decode(self.codes(), self.scales()).to(dtype)
