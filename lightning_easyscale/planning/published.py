"""Published step times of EasyScale as a profile.

Source: EasyScale (Li et al., SC'23), Fig. 12: seconds per mini-batch of data-parallel training on V100-32GB, P100-16GB
and T4-16GB with stock, deterministic (D1) and hardware-agnostic (D2) kernels, one batch size per workload. The samples
of an epoch are those of the published trace simulation (one per cent of each data set).
"""

from __future__ import annotations

from dataclasses import replace

from lightning_easyscale.planning.communication import LinkFit, fit_link
from lightning_easyscale.planning.profile import Measurement, Profile, rows

TYPES = ("v100", "p100", "t4")
_FIG12 = {
    ("shufflenetv2", 128): ((0.2163, 0.2167, 0.4697), (0.3645, 0.3310, 0.8722), (0.4039, 0.4022, 0.6782)),
    ("resnet50", 64): ((0.2503, 0.2688, 0.5860), (0.4150, 0.4393, 1.1595), (0.6097, 0.6591, 1.2230)),
    ("vgg19", 32): ((0.2586, 0.3924, 1.1327), (0.3778, 0.6514, 2.0655), (0.5402, 0.9439, 2.2755)),
    ("yolov3", 8): ((0.4731, 0.4590, 0.5491), (0.7018, 0.7169, 0.9833), (0.8673, 0.8133, 1.0355)),
    ("neumf", 1024): ((0.0103, 0.0105, 0.0107), (0.0135, 0.0130, 0.0127), (0.0109, 0.0110, 0.0118)),
    ("bert", 8): ((0.4413, 0.4406, 0.4390), (0.6069, 0.6007, 0.5998), (0.6811, 0.6819, 0.6661)),
    ("electra", 8): ((0.4420, 0.4418, 0.4433), (0.6050, 0.6023, 0.5958), (0.6812, 0.6853, 0.6654)),
    ("swin", 32): ((0.4132, 0.4114, 0.4289), (0.5935, 0.5945, 0.5941), (0.6030, 0.5974, 0.6153)),
}
SAMPLES_PER_EPOCH = {
    "shufflenetv2": 12800.0,
    "resnet50": 12800.0,
    "vgg19": 12800.0,
    "swin": 12800.0,
    "yolov3": 165.51,
    "bert": 886.41,
    "electra": 886.41,
    "neumf": 49708.45,
}
PARAMETERS = {
    "shufflenetv2": 2_278_604,
    "resnet50": 25_557_032,
    "vgg19": 143_667_240,
    "swin": 28_288_354,
    "yolov3": 61_626_049,
    "neumf": 31_832_577,
    "bert": 108_893_186,
    "electra": 108_893_186,
}
"""Parameters of the workloads' usual models (ELECTRA in BERT-base's shape); four bytes each make the gradients."""
FIG13_SECONDS = {
    "shufflenetv2": (0.33874, 0.36423),
    "resnet50": (0.50640, 0.51224),
    "vgg19": (0.77596, 1.01822),
    "neumf": (0.01508, 0.02698),
    "yolov3": (0.48015, 0.56694),
    "bert": (0.65097, 0.84466),
    "electra": (0.65839, 0.89021),
    "swin": (0.60399, 0.64380),
}
"""Fig. 13: seconds of a middle EST's mini-batch (gradient copy only) and of the last one's (with synchronisation)."""
ALIASES = {"ncf": "neumf", "swintransformer": "swin"}


def published_link(executors: int = 2) -> LinkFit:
    """The link that explains Fig. 13 best: what the last EST needs beyond a middle one is the exchange.

    Args:
        executors: devices that took part; the figure does not say, two are assumed.
    """
    return fit_link([(4.0 * PARAMETERS[w], executors, last - middle) for w, (middle, last) in FIG13_SECONDS.items()])


def published_profile(*, batch_rule: str = "constant", d2_everywhere: bool = False) -> Profile:
    """The published step times.

    Args:
        batch_rule: how times depend on the batch size; one size was published per workload.
        d2_everywhere: give every row the D2 column's time, as the published simulation's results suggest it did.
    """
    measurements: list[Measurement] = []
    for (workload, batch), times in _FIG12.items():
        measurements += rows(workload, batch, [(t, *values) for t, values in zip(TYPES, times, strict=True)])
    if d2_everywhere:
        d2 = {(m.workload, m.device_type): m.seconds for m in measurements if m.kernels == "D2"}
        measurements = [replace(m, seconds=d2[m.workload, m.device_type]) for m in measurements]
    return Profile(
        name="published-d2" if d2_everywhere else "published",
        source="EasyScale, SC'23, Fig. 12 (seconds per mini-batch on V100, P100, T4)",
        measurements=tuple(measurements),
        batch_rule=batch_rule,
        samples_per_epoch=dict(SAMPLES_PER_EPOCH),
    )
