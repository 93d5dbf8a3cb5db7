"""LLM.int8(), NF4 or FP4 of bitsandbytes, through transformers as its users call it; leaves its buffers as they are."""

from __future__ import annotations

from handover import Handover, serve


def compress(request: Handover) -> None:
    """Load the model quantized, and take the linears' buffers out of it."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    settings, eight = dict(request.settings), request.settings.pop("bits") == 8
    if eight:
        config = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=settings["threshold"], llm_int8_skip_modules=request.others
        )
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings["quant_type"],
            bnb_4bit_use_double_quant=settings["double_quantization"],
            bnb_4bit_compute_dtype=request.dtype,
            llm_int8_skip_modules=request.others,
        )
    with request.clock():
        model = request.load(quantization_config=config, device_map=request.device)
    modules = dict(model.named_modules())
    for name in request.linears:
        linear = modules[name]
        for part in ("weight", "SCB") if eight else ():
            request.tensors[f"{name}.{part}"] = linear.state_dict()[part].cpu()
        if not eight:
            take_four_bits(request, name, linear.weight)
            state = linear.weight.quant_state
            state.dtype = request.dtype
            request.witness(name, bitsandbytes.functional.dequantize_4bit(linear.weight.data, state))
    request.finish("bitsandbytes")


def take_four_bits(request: Handover, name: str, weight: object) -> None:
    """Codes two to a byte and one scale a block of the flat weight; with double quantization the scales' own codes."""
    state = weight.quant_state
    parts = {"packed": weight.data.flatten(), "absmax": state.absmax, "code": state.code}
    if state.nested:
        nested = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        parts |= nested | {"nested_offset": state.offset.reshape(1)}
    for part, tensor in parts.items():
        request.tensors[f"{name}.{part}"] = tensor.cpu()
    request.settings["block"] = state.blocksize


if __name__ == "__main__":
    serve(compress)
