"""Probes in trainers of other libraries, none of which is installed here."""

import pytest
import torch
from torch import nn

import normkit as nk

EVENTS = ("on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end")


class Trainer:
    """Calls its callbacks as Hugging Face's does: every event, with everything by name."""

    def __init__(self, model, callbacks, *, tells_of_optimizer=True):
        self.model, self.callbacks, self.tells = model, callbacks, tells_of_optimizer
        self.call("on_init_end")

    def call(self, event):
        for callback in self.callbacks:
            assert getattr(callback, event)("args", "state", "control", model=self.model) is None

    def train(self, batches, fails_at=None):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for event in EVENTS[1:3]:
            self.call(event)
        for number, batch in enumerate(batches):
            self.call("on_step_begin")
            if number == fails_at:
                raise RuntimeError("out of memory")
            self.model(batch).square().mean().backward()
            self.call("on_pre_optimizer_step")
            optimizer.step()
            if self.tells:
                self.call("on_optimizer_step")
            optimizer.zero_grad(set_to_none=self.tells)
            self.call("on_step_end")
            self.call("on_log")
        self.call("on_train_end")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def data():
    return list(torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1)))


def test_hugging_faces_trainer_tells_a_probe_of_its_steps():
    model, reference = net(), net()
    probe = nk.Probe(model, every=2)
    Trainer(model, [probe.callback("transformers")]).train(data())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    with nk.Probe(reference, every=2) as expected:
        for batch in data():
            reference(batch).square().mean().backward()
            optimizer.step()
            expected.step()
            optimizer.zero_grad()
    assert [record.step for record in probe.records] == [2, 4, 6]
    assert probe.records == expected.records
    assert not any(module._forward_hooks for module in model.modules())


def test_versions_that_do_not_tell_of_the_optimizer_count_steps_too():
    model = net()
    probe = nk.Probe(model, every=3)
    Trainer(model, [probe.callback("transformers")], tells_of_optimizer=False).train(data())
    assert [record.step for record in probe.records] == [3, 6]


def test_a_training_after_one_that_broke_opens_the_probe_anew():
    model = net()
    probe = nk.Probe(model, every=1)
    trainer = Trainer(model, [probe.callback("transformers")])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train(data(), fails_at=2)
    trainer.train(data())
    assert len(probe.records) == 8


@pytest.mark.parametrize("event", [*EVENTS, "on_exception", "setup", "state_key"])
def test_a_probe_that_is_given_itself_says_what_to_give(event):
    probe = nk.Probe(net())
    message = rf"asks for its {event}; give Lightning's Trainer probe.callback\(\), and"
    with pytest.raises(nk.CallbackError, match=message):
        getattr(probe, event)
    assert not hasattr(probe, event)  # as Fabric asks
    with pytest.raises(AttributeError, match=r"^Probe has no attribute 'recrods'$"):
        _ = probe.recrods


def test_other_trainers_are_not_known():
    with pytest.raises(nk.OptionError, match=r"of='keras'"):
        nk.Probe(net()).callback("keras")
    with pytest.raises(AttributeError, match="has no attribute 'step'"):
        _ = nk.Probe(net()).callback("transformers").step
