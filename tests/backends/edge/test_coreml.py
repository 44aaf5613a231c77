import json

import pytest
import torch

import refold
from refold.errors import MissingDependencyError, UsageError
from tests.backends import runtimes
from tests.backends.edge import mil
from tests.small_nets import ConvNet, seeded

pytestmark = pytest.mark.edge


@pytest.fixture(scope="module")
def built():
    model, x = seeded(ConvNet()), torch.randn(1, 3, 8, 8)
    return refold.compile_for_inference(model, x, target="coreml", expect={"batch-norm": 1})


def test_package_is_complete_and_in_float32(built, tmp_path):
    import coremltools

    path = built.save(tmp_path / "net.mlpackage")
    inside = "Data/com.apple.CoreML"
    runtimes.check_files(
        path, {"Manifest.json", f"{inside}/model.mlmodel", f"{inside}/weights/weight.bin"}
    )
    assert json.loads((path / "Manifest.json").read_text())["itemInfoEntries"]
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    assert [i.name for i in spec.description.input] == ["x"]
    assert [o.name for o in spec.description.output] == ["output"]
    assert list(spec.description.input[0].type.multiArrayType.shape) == [1, 3, 8, 8]
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    kinds = [op.type for op in block.operations if op.type != "const"]
    assert kinds == ["conv", "relu", "reduce_mean", "linear"]
    assert built.report.artifact["nodes"] == 4


@pytest.mark.parametrize("net", runtimes.NETS)
def test_numbers_of_what_the_package_says(net, tmp_path):
    """Nothing here runs Core ML: the program in the file is read back and computed in float64."""
    model, x = seeded(net()), torch.randn(1, 4, 8, 8)
    compiled = refold.compile_for_inference(model, x, target="coreml")
    path = compiled.save(tmp_path / "net.mlpackage")
    with torch.no_grad():
        for given in (x, torch.randn_like(x)):
            want = model.double()(given.double())
            torch.testing.assert_close(mil.run_package(path, given), want, rtol=1e-5, atol=1e-5)


def test_says_that_it_was_not_run(built):
    assert built.report.artifact_numerics is None
    assert any("was not run here" in note for note in built.report.notes)
    with pytest.raises(MissingDependencyError, match="converts only"):
        built(torch.randn(1, 3, 8, 8))


def test_other_suffix_is_refused(built, tmp_path):
    with pytest.raises(UsageError, match=r"net\.mlmodel\.mlpackage"):
        built.save(tmp_path / "net.mlmodel")
