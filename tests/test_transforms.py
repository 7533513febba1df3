"""Function transforms in a graph: masks made by `vmap`, and the operations allowed inside."""

import copy
import warnings

import pytest
import torch
from compare import Rules, Trio, tokens
from models import PastDecoder, hugging_face, own, randomize
from oracle import CACHE, Yardstick, assert_close_to
from test_surroundings import KnowsLinear
from torch import vmap

from think_compile import ThinkWarning, report, think_compile
from think_compile.cache.handle import Handle
from think_compile.passes.normalize import normalize
from think_compile.passes.refusal import Reason, Refused


class MaskOfPairs(PastDecoder):
    """Its mask is a function of a query and a key, mapped over all pairs, as in attention to images."""

    def forward(self, ids, past=None, mask=None):
        new, total = mask.shape[-2:]

        def attends(batch, query, key):
            return (key <= query + total - new) & mask[batch % mask.shape[0], 0, query, key]

        over_keys = vmap(attends, (None, None, 0))
        over_queries = vmap(over_keys, (None, 0, None))
        pairs = vmap(over_queries, (0, None, None))(*map(torch.arange, (ids.shape[0], new, total)))
        return super().forward(ids, past, pairs[:, None])


def of_pairs():
    model = own("tuple_cat")
    model.__class__ = MaskOfPairs
    return model


@pytest.mark.versions
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@torch.no_grad()
def test_masks_made_by_vmap(ratio):
    trio = Trio("tuple_cat", Rules(ratio), model=of_pairs())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ThinkWarning)
        trio.run(tokens(2, 24), [12, 1, 1, 6, 4])
    trio.check_handles(2)
    assert len(report(trio.model).rewritten) == 2


@pytest.mark.slow  # checks that Inductor accepts the replacement of a vmap; the test above runs the same graph
@torch.no_grad()
def test_masks_made_by_vmap_through_inductor():
    trio = Trio("tuple_cat", Rules(), model=of_pairs(), lowering="inductor")
    trio.run(tokens(2, 24), [12, 1, 1, 6, 4])
    assert len(report(trio.model).rewritten) == 2


TABLE = torch.arange(12.0).view(3, 4)


def constant(x):
    return vmap(lambda row: row * torch.tensor([1.0, 2.0, 3.0, 4.0]))(x)


def written_within(x):
    return vmap(lambda row: torch.zeros_like(row).add_(row).mul_(2))(x)


def written_outside(x):
    count = torch.zeros(4)
    doubled = vmap(lambda row: (count.add_(1), row * 2)[1])(x)
    return doubled, count


def writes_its_input(x):
    vmap(lambda row: row.mul_(3))(x)
    return x + 1


def returns_a_view(x):
    part = vmap(lambda row: row[:2])(x)
    x.add_(1)
    return part


def two_after_another(x):
    first = vmap(torch.sin)(x)
    return vmap(torch.dot, (None, 1))(first[:, 0], x)


def attended(x):
    q = x[None].expand(2, 3, 4)
    return vmap(torch.nn.functional.scaled_dot_product_attention)(q[:, None], q[:, None], q[:, None])


FUNCTIONS = [constant, written_within, written_outside, writes_its_input, returns_a_view, two_after_another, attended]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
@torch.no_grad()
def test_what_stands_within_a_vmap(function, dynamic):
    """The graph without transforms has the results and the writes of the function."""
    graphs = []

    def backend(gm, example_inputs):
        normalized = normalize(gm, example_inputs)
        graphs.append(normalized.graph_module.graph)

        def run(*inputs):
            results = normalized.graph_module(*inputs)
            for i, value in zip(normalized.written, results, strict=False):
                inputs[i].copy_(value)
            return results[len(normalized.written) :]

        return run

    ours, theirs = TABLE.clone(), TABLE.clone()
    got = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(ours)
    torch.testing.assert_close(got, function(theirs))
    torch.testing.assert_close(ours, theirs)
    calls = [node.target for node in graphs[0].nodes if node.op == "call_function"]
    assert calls and all(isinstance(target, torch._ops.OpOverload) for target in calls)


def refused_graph(function, *inputs, change=lambda graph: None):
    """The reason for refusing the changed graph of a function."""
    caught = []

    def backend(gm, example_inputs):
        change(gm.graph)
        with pytest.raises(Refused) as refused:
            normalize(gm, example_inputs)
        caught.append(refused.value)
        return lambda *inputs: inputs

    torch.compile(function, backend=backend)(*inputs)
    return caught[0]


@torch.no_grad()
def test_a_transform_that_cannot_be_traced():
    """It leaves no transform level open, and the refusal names it."""

    def change(graph):
        for node in graph.find_nodes(op="call_function", target=torch.sin):
            node.target = torch.Tensor.tolist

    why = refused_graph(lambda x: vmap(torch.sin)(x), TABLE, change=change)
    assert why.reason is Reason.HIGHER_ORDER and "vmap" in why.detail
    assert vmap(torch.sin)(TABLE).equal(TABLE.sin())
    assert torch._C._functorch.peek_interpreter_stack() is None


@torch.no_grad()
def test_a_weight_of_a_class_of_its_own_within_a_vmap():
    weight = KnowsLinear.of(torch.randn(5, 4))
    why = refused_graph(lambda x, w: vmap(lambda row: torch.nn.functional.linear(row, w, None))(x), TABLE, weight)
    assert why.reason is Reason.HIGHER_ORDER and "KnowsLinear" in why.detail


def with_images():
    """A tiny Gemma 3, and a prompt with an image of 16 tokens that all see each other."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8, "vision_use_head": False}
    text = hugging_face("gemma3", num_hidden_layers=2, layer_types=["full_attention"] * 2).config
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**vision),
        mm_tokens_per_image=16,
        image_token_index=95,
        boi_token_index=94,
        eoi_token_index=93,
    )
    ids = torch.cat([tokens(1, 4) % 90, torch.full((1, 16), 95), tokens(1, 8) % 90], 1)
    given = {"pixel_values": torch.randn(1, 3, 32, 32), "token_type_ids": (ids == 95).long()}
    model = randomize(Gemma3ForConditionalGeneration(config))
    model.model.vision_tower.set_attn_implementation("eager")  # the oracle watches the operation
    return model, ids, given


@pytest.mark.filterwarnings("ignore:.*vision_tower")  # whose graph comes first, and keeps no cache
@torch.no_grad()
def test_a_prompt_with_an_image():
    """The first call is pruned, and later ones agree with the oracle: their single query chooses no channels."""
    plain, ids, given = with_images()
    pair = Yardstick(plain, **vars(Rules()))
    ours = think_compile(copy.deepcopy(plain), lowering="eager", **vars(Rules()))
    models = (ours, pair.same, pair.exact)
    caches = [None] * 3
    for part in (ids, tokens(1, 1), tokens(1, 3)):
        outputs = []
        for i, model in enumerate(models):
            pixels = {"pixel_values": given["pixel_values"].to(torch.float64 if model is pair.exact else torch.float32)}
            extra = given | pixels if caches[i] is None else {}
            output = model(part, **{CACHE: caches[i]}, use_cache=True, **extra)
            caches[i] = output[CACHE]
            outputs.append(output.logits)
        assert_close_to(outputs[1], outputs[0], outputs[2], what=f"logits of {part.shape[1]} tokens")
    assert isinstance(caches[0].layers[0].keys, Handle)
    assert len(report(ours).rewritten) == 2
