"""Networks of cells: their sizes, what a cell computes, and genotypes as they are written."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from normkit.errors import DataError, SpecError
from normkit.lab.models import build_model
from normkit.lab.models.architecture import Shapes
from normkit.lab.models.build import apply_arm
from normkit.lab.models.darts import (
    ArchitectureWeights,
    Cell,
    CellNetwork,
    Darts,
    SearchCell,
    Supernet,
    cells_of,
)
from normkit.lab.models.genotype import (
    EDGES,
    GENOTYPES,
    OPERATIONS,
    Genotype,
    derived,
    read_genotype,
)
from normkit.lab.models.operations import make_operation

CIFAR = Shapes(input_shape=(3, 32, 32), num_classes=10)
SMALL = Shapes(input_shape=(1, 8, 8), num_classes=3)


def supernet(task=SMALL, cells=3, channels=2):
    return Supernet(lambda cell: CellNetwork(cell, task, num_cells=cells, num_channels=channels))


def size(model, without):
    return sum(p.numel() for name, p in model.named_parameters() if without not in name)


def test_networks_have_the_sizes_that_the_authors_logs_print():
    with torch.device("meta"):
        found = Darts().network(cells_of(GENOTYPES["darts-v2"]), CIFAR, auxiliary=True)
        searched = supernet(CIFAR, cells=8, channels=16)
    assert size(found, "auxiliary") == 3_349_342
    assert size(searched, "architecture") == 1_930_618


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("side", [8, 7])  # even and odd
@pytest.mark.parametrize("in_search", [True, False])
def test_operations_keep_channels_and_halve_the_map_by_their_stride(name, side, in_search):
    x = torch.randn(3, 4, side, side)
    for stride in (1, 2):
        operation = make_operation(name, 4, stride, in_search=in_search)
        assert operation(x).shape == (3, 4, -(-side // stride), -(-side // stride))
        norms = [m for m in operation.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.affine is not in_search for norm in norms)


def test_norms_of_the_search_have_no_scale_whatever_replaces_them():
    network = supernet()
    apply_arm(network, "gn:max=2", batch_size=4, input_shape=(1, 8, 8), name="darts")
    affine = {name for name, p in network.named_parameters() if p.dim() == 1}
    assert affine == {"body.stem.1.weight", "body.stem.1.bias", "body.classifier.bias"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


def test_a_search_cell_is_the_weighted_sum_of_all_operations():
    shared = ArchitectureWeights()
    with torch.no_grad():
        shared.normal.normal_()
    cell = SearchCell(shared, (3, 5), 2).eval()
    x0, x1 = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    nodes = [cell.inputs.older(x0), cell.inputs.newer(x1)]
    weights, at = functional.softmax(shared.normal, -1), 0
    for node in range(4):
        total = torch.zeros_like(nodes[0])
        for source in range(2 + node):
            for which in range(len(OPERATIONS)):
                total = total + weights[at, which] * cell.edges[at].operations[which](nodes[source])
            at += 1
        nodes.append(total)
    torch.testing.assert_close(cell(x0, x1), torch.cat(nodes[2:], 1))


def test_a_cell_computes_what_its_genotype_says():
    genotype = Genotype.checked(
        {
            "normal": (
                ("skip_connect", 0), ("max_pool_3x3", 1), ("avg_pool_3x3", 2), ("skip_connect", 2),
                ("skip_connect", 3), ("skip_connect", 1), ("skip_connect", 4), ("max_pool_3x3", 0),
            ),
            "reduce": (("skip_connect", 0),) * 8,
            "normal_concat": (2, 5),
        }
    )  # fmt: skip
    cell = Cell(genotype, (2, 2), 2).eval()
    assert cell.num_channels == 4
    x0, x1 = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    a, b = cell.inputs.older(x0), cell.inputs.newer(x1)

    def largest(x):
        return functional.max_pool2d(x, 3, 1, 1)

    n2 = a + largest(b)
    n3 = functional.avg_pool2d(n2, 3, 1, 1, count_include_pad=False) + n2
    n5 = (n3 + b) + largest(a)
    torch.testing.assert_close(cell(x0, x1), torch.cat([n2, n5], 1))


def test_paths_are_left_out_by_example_but_identities_never():
    genotype = Genotype.checked(
        {
            "normal": (("skip_connect", 0), ("max_pool_3x3", 1)) * 4,
            "reduce": (("skip_connect", 0),) * 8,
            "normal_concat": (2,),
        }
    )
    cell = Cell(genotype, (2, 2), 2).train()
    cell.drop_path = 0.25
    x0, x1 = torch.randn(400, 2, 4, 4), torch.randn(400, 2, 4, 4)
    torch.manual_seed(0)
    identity, pooled = cell.inputs.older(x0), cell.inputs.newer(x1)
    rest = cell(x0, x1) - identity
    whole = functional.max_pool2d(pooled, 3, 1, 1) / 0.75
    lost = rest.flatten(1).abs().amax(1) < 1e-6
    torch.testing.assert_close(rest[~lost], whole[~lost])
    assert lost.float().mean().item() == pytest.approx(0.25, abs=0.07)
    cell.eval()
    identity, pooled = cell.inputs.older(x0), cell.inputs.newer(x1)
    torch.testing.assert_close(cell(x0, x1), identity + functional.max_pool2d(pooled, 3, 1, 1))


def test_auxiliary_scores_come_in_training_only():
    for task, side in ((CIFAR, 32), (SMALL, 8)):
        network = Darts(cells=3, channels=2).network(
            cells_of(GENOTYPES["darts-v1"]), task, auxiliary=True
        )
        x = torch.randn(2, task.input_shape[0], side, side)
        scores, extra = network.train()(x)
        assert scores.shape == extra.shape == (2, task.num_classes)
        assert network.eval()(x).shape == (2, task.num_classes)


def test_darts_is_a_model_like_others():
    built = build_model("darts:cells=3:channels=4", num_classes=3, input_shape=(1, 8, 8), norm="ln")
    assert built.model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert {place.norm for place in built.norms} == {"ln"}


def by_hand():
    """Weights of a cell of which the strongest edges and operations are known."""
    weights = torch.zeros(len(EDGES), len(OPERATIONS))
    weights[:, 0] = 0.9  # none is never taken
    strong = {
        (2, 0): ("sep_conv_3x3", 0.5), (2, 1): ("skip_connect", 0.4),
        (3, 2): ("max_pool_3x3", 0.6), (3, 0): ("dil_conv_5x5", 0.3), (3, 1): ("skip_connect", 0.2),
        (4, 1): ("avg_pool_3x3", 0.2), (4, 3): ("sep_conv_5x5", 0.1),
        (5, 4): ("skip_connect", 0.7), (5, 0): ("dil_conv_3x3", 0.6), (5, 3): ("skip_connect", 0.5),
    }  # fmt: skip
    for edge, (operation, weight) in strong.items():
        weights[EDGES.index(edge), OPERATIONS.index(operation)] = weight
    return weights


def test_derivation_keeps_two_strongest_edges_of_a_node():
    found = derived(by_hand(), by_hand())
    expected = (
        ("sep_conv_3x3", 0), ("skip_connect", 1), ("max_pool_3x3", 2), ("dil_conv_5x5", 0),
        ("avg_pool_3x3", 1), ("sep_conv_5x5", 3), ("skip_connect", 4), ("dil_conv_3x3", 0),
    )  # fmt: skip
    assert found.normal == found.reduce == expected


def test_genotypes_are_read_as_they_are_written(tmp_path):
    known = GENOTYPES["darts-v2"]
    path = known.write(tmp_path / "found.json")
    assert read_genotype(str(path)) == read_genotype(str(known)) == known
    log = tmp_path / "log.txt"
    ranges = str(known).replace("[2, 3, 4, 5]", "range(2, 6)")
    log.write_text(f"07/10 search genotype = {ranges}\n")
    assert read_genotype(str(log)) == known


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"normal": [["conv_7x7", 0]] * 8}, "has the operation 'conv_7x7'; known are max_pool_3x3"),
        ({"normal": [["skip_connect", 2]] * 8}, "node 2 .* takes the output of node 2; .* 0 to 1"),
        (
            {"reduce": [["skip_connect", 0]] * 7},
            "the reduce cell of a genotype has 7 edges; it has 8",
        ),
        ({"normal_concat": [2, 2]}, r"gives the nodes \[2, 2\]; it gives one or more"),
        ({"normal": "sep"}, "normal was given"),
        ({"more": 1}, "'more' is no field; known are normal, reduce"),
    ],
)
def test_what_is_no_genotype_is_refused(change, complaint, tmp_path):
    values = json.loads(GENOTYPES["darts-v1"].model_dump_json()) | change
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(values))
    with pytest.raises(SpecError, match=complaint):
        read_genotype(str(path))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "darts-v3",
            "there is no genotype 'darts-v3'; known are darts-v1, darts-v2, or give a file",
        ),
        ("Genotype(normal=", "which is no genotype .* write Genotype"),
        ("{]", "which is no genotype .* write Genotype"),
        ("Genotype(normal=[f()], reduce=[])", "which is no genotype"),
    ],
)
def test_text_that_does_not_parse_is_refused(text, complaint):
    with pytest.raises(SpecError, match=complaint):
        read_genotype(text)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.json cannot be read"):
        read_genotype(str(tmp_path / "none.json"))
    (tmp_path / "text.txt").write_text("nothing of the kind")
    with pytest.raises(SpecError, match=r"text.txt is given as 'nothing of the kind'"):
        read_genotype(str(tmp_path / "text.txt"))
