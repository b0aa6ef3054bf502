"""Networks to ONNX files, as this library writes them."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightrope.errors import InputError
from tightrope.graph.onnx import read_onnx, write_onnx

from .conftest import array, node, save


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first((x - 0.1) / 0.3)
        return self.last(F.max_pool2d(F.relu(self.norm(h)) + h, 2).flatten(1))


def test_what_was_written_is_read_again_and_says_nothing_of_this_machine(tmp_path, capfd):
    torch.manual_seed(0)
    net = Residual().train()
    net(torch.rand(8, 1, 6, 6))
    write_onnx(net, (1, 6, 6), tmp_path / "net.onnx")
    assert net.training
    assert b"site-packages" not in (tmp_path / "net.onnx").read_bytes()
    x = torch.rand(5, 1, 6, 6)
    again = read_onnx(tmp_path / "net.onnx")
    assert torch.allclose(again(x), net.eval()(x), atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Linear(3, 2))
    monkeypatch.setattr("tightrope.graph.onnx.write._export", lambda network, x: save_and_load(tmp_path))
    with pytest.raises(InputError, match="what was exported and the network do not agree"):
        write_onnx(net, (3,), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def save_and_load(folder: Path) -> onnx.ModelProto:
    with warnings.catch_warnings():
        return onnx.load(
            save(folder / "other.onnx", [node("MatMul", "x w", "y")], {"w": array(3, 2)}, [1, 3])
        )
