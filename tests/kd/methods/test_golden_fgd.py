"""FGD on one level against the original code."""
import pytest
import torch
from golden_cases import DTYPES, cases, load, load_exactly, relative, tensors, under

from kd.methods.fgd import FeatureLoss

SETTINGS = ("temp", "alpha_fgd", "beta_fgd", "gamma_fgd", "lambda_fgd")
TERMS = {"fg": "alpha", "bg": "beta", "mask": "gamma", "relation": "lambda"}

# Largest deviations measured, as float64 and float32: terms 1.2e-9, 1.6e-7; value 2.3e-10, 7.3e-8; gradient 2.5e-8,
# 4.8e-7; parameters' gradients 3.4e-8, 3.5e-7. (The files hold the module's parameters in float32.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases("fgd_"))
def test_value_terms_and_gradients(name, dtype):
    arrays, meta = load(name)
    loss = FeatureLoss(meta["student_channels"], meta["teacher_channels"], **{k: meta[k] for k in SETTINGS})
    load_exactly(loss, tensors(under(arrays, "state_dict")))
    loss.to(dtype)
    student, teacher = (torch.from_numpy(arrays[k]).to(dtype) for k in ("student", "teacher"))
    boxes = [torch.from_numpy(arrays[f"gt_boxes/{i}"]).to(dtype) for i in range(len(student))]
    arguments = student.requires_grad_(), teacher, boxes, meta["image_sizes"]

    terms = loss.terms(*arguments)
    for ours, theirs in TERMS.items():
        assert relative(terms[ours], arrays[f"terms/{theirs}"]) < TOLERANCE[dtype], ours
    value = loss(*arguments)
    assert value.dtype == dtype
    assert relative(value, arrays["value"]) < TOLERANCE[dtype]

    value.backward()
    assert relative(student.grad, arrays["grad"]) < TOLERANCE[dtype]
    # Some of these are zero but for rounding, the softmax's bias say: all are measured on the largest.
    expected = under(arrays, "parameter_grad")
    largest = max(abs(value).max() for value in expected.values())
    parameters = dict(loss.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, value in expected.items():
        assert relative(parameters[key].grad, value, largest) < TOLERANCE[dtype], key
