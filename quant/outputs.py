from dataclasses import dataclass

from lightship.checkpoint import EXPERT
from lightship.records import Plan


@dataclass(frozen=True)
class OutputTensor:
    name: str
    dtype: str
    shape: list[int]

    @property
    def nbytes(self) -> int:
        n = {"F32": 4, "BF16": 2, "I8": 1, "F8_E4M3": 1}[self.dtype]
        for d in self.shape:
            n *= d
        return n


def outputs_of(plan: Plan) -> list[OutputTensor]:
    out = []
    for t in plan.tensors:
        if t.action != "int4":
            out.append(OutputTensor(t.name, t.dtype, list(t.shape)))
        elif (m := EXPERT.match(t.name)) and m["part"] == "weight":
            o, i = t.shape
            w = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[m["projection"]]
            out += [
                OutputTensor(t.name, "I8", [o, i // 2]),
                OutputTensor(t.name + "_scale_inv", "BF16", [o, i // 128]),
                OutputTensor(f"{m['layer_name']}.experts.{m['expert']}.{w}.input_scale", "BF16", []),
            ]
    return out
