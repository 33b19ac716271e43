import json
from functools import partial

import lightning
import pytest
import torch

from dynprune.adapters.checkpoint import load_adapters, save_adapters, save_thesis_adapters
from dynprune.adapters.distillation import Distillation, mse_loss, relative_loss
from dynprune.adapters.stack import AdapterStack
from dynprune.data.datamodule import StreamData
from dynprune.data.hidden_states import HiddenStateStream


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
def test_distillation_trains_every_layer_towards_its_layer_and_changes_every_parameter(make_slm, tmp_path, loss):
    lightning.seed_everything(0)
    slm = make_slm()
    stack = AdapterStack(4, 32, 16)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    module = Distillation(stack, loss, partial(torch.optim.Adam, lr=1e-2))
    data = StreamData(
        HiddenStateStream(slm, sequences(40), batch_tokens=128, seed=0),
        [HiddenStateStream(slm, sequences(6), batch_tokens=128, seed=None)],
    )
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
    )
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
