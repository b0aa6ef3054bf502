"""The averaged network: which weights it is the mean of, with which statistics, and what is done with it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tightrope import fit, methods
from tightrope.data import Augment, as_source, hold_out
from tightrope.errors import InputError
from tightrope.files import load_tensors
from tightrope.graph import trace
from tightrope.recipes import parse_recipe
from tightrope.train import Course, Interrupted
from tightrope.train.average import Average, AveragedNetwork, recompute_statistics
from tightrope.train.methods import LatentAttack
from tightrope.train.stages import Layerwise, frozen_upto

IMAGES, HELD_OUT, BATCH, PER_EPOCH, EPOCHS = 63, 12, 16, 4, 4
METHOD = methods.ibp(eps=0.1, ramp=Course(begin=0.1, finish=0.4))
SWA, EMA = {"begin": 0.5}, {"begin": "1/2", "decay": 0.8}


class Watched:
    """A source that keeps the network as it is before each step, and may stop the run there."""

    def __init__(self, source, module, stop=None):
        self.source, self.module, self.stop = source, module, stop
        self.shape, self.labels, self.identity = source.shape, source.labels, source.identity
        self.seen: list[dict[str, torch.Tensor]] = []
        self.calls = 0

    def __len__(self):
        return len(self.source)

    def batches(self, order):
        self.calls += 1
        for batch in self.source.batches(order):
            if self.calls > 1:  # the first call reads the held-out examples
                self.seen.append({k: v.clone() for k, v in self.module.state_dict().items()})
            if len(self.seen) == self.stop:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


@pytest.fixture(scope="module")
def run(network, images):
    """Trains in a folder, and yields what the source saw and the run."""

    def train(out, method=METHOD, stop=None, module=None, **options):
        module = module or network(norm=True, dropout=True)
        source = Watched(as_source(images(IMAGES)), module, stop)
        usual = {"epochs": EPOCHS, "batch": BATCH, "held_out": HELD_OUT, "lr": 0.01, "device": "cpu"}
        usual |= {"checkpoint_seconds": 1e6, "augment": Augment(flip=True, pad=1)}
        return source.seen, fit(module, source, method, out=out, **usual | options)

    return train


@pytest.fixture(scope="module")
def raw(run, tmp_path_factory):
    """The network after each step of a run that averages nothing."""
    out = tmp_path_factory.mktemp("raw")
    seen, _ = run(out)
    return [*seen, weights(out)]


@pytest.fixture(scope="module")
def averaged(run, tmp_path_factory):
    """The folder of a run that nothing disturbed, made once per average."""
    folders = {}

    def make(average):
        if str(average) not in folders:
            folders[str(average)] = tmp_path_factory.mktemp("averaged")
            run(folders[str(average)], average=average)
        return folders[str(average)]

    return make


def weights(out, name="model.safetensors"):
    return load_tensors(out / name)[0]


def same(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def records(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


class TestMean:
    @pytest.mark.parametrize(
        ("begin", "epochs"), [(0.0, [1, 2, 3, 4]), (0.5, [2, 3, 4]), (0.51, [3, 4]), (1, [4])]
    )
    def test_the_ends_of_the_epochs_from_begin_on_count_the_same(
        self, network, run, raw, tmp_path, begin, epochs
    ):
        warned = pytest.warns(UserWarning, match="smaller balls") if begin < 0.4 else nullcontext()
        with warned:
            run(tmp_path, average={"begin": begin})
        trained = weights(tmp_path)
        for name, _ in network(norm=True, dropout=True).named_parameters():
            mean = torch.stack([raw[PER_EPOCH * epoch][name].double() for epoch in epochs]).mean(0)
            torch.testing.assert_close(trained[name].double(), mean, rtol=1e-6, atol=1e-7)

    def test_an_exponential_average_takes_in_every_step(self, network, raw, averaged):
        trained = weights(averaged(EMA))
        for name, _ in network(norm=True, dropout=True).named_parameters():
            first, *rest = (seen[name].double() for seen in raw[len(raw) // 2 :])
            for weight in rest:
                first = 0.8 * first + 0.2 * weight
            torch.testing.assert_close(trained[name].double(), first, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("average", [SWA, EMA])
    def test_the_weights_in_training_know_nothing_of_it(self, raw, averaged, average):
        saved = weights(averaged(average), "checkpoint/last.safetensors")
        assert same(
            {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}, raw[-1]
        )

    def test_nor_do_attacks_at_statistics_that_are_recomputed(self, run, tmp_path):
        """They look at the statistics of the network in training, not of the averaged one."""
        attacked, kept = methods.sabr(eps=0.1, share=0.4, ramp=METHOD.eps.course()), []
        for name, average in (("with", SWA), ("without", None)):
            run(tmp_path / name, attacked, bn_statistics="recompute", average=average)
            kept.append(weights(tmp_path / name, "checkpoint/last.safetensors"))
        trained = [{k: v for k, v in each.items() if k.startswith("model.")} for each in kept]
        assert same(*trained)

    def test_shared_weights_stay_shared(self):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module[1].weight = module[0].weight
        average = AveragedNetwork(Average(begin=0), module)
        for value in (1.0, 3.0):
            nn.init.constant_(module[0].weight, value)
            average.learn(1.0, epoch_ends=True)
        average.replace()
        assert module[1].weight is module[0].weight
        assert torch.equal(module[0].weight, torch.full((2, 2), 2.0))


class TestWhatIsDoneWithIt:
    @pytest.mark.parametrize("average", [SWA, EMA])
    def test_it_is_what_is_measured_saved_and_handed_back(self, run, images, tmp_path, average):
        _, result = run(tmp_path, average=average)
        assert same(result.model.state_dict(), weights(tmp_path))
        found = records(tmp_path)
        assert [record.get("averaged", False) for record in found] == [False, True, True, True]
        split = images(IMAGES)
        _, aside = hold_out(split.y, HELD_OUT, 0)
        correct = (result.model(split.x[aside]).argmax(1) == split.y[aside]).float().mean().item()
        assert found[-1]["held_out"]["clean"] == pytest.approx(correct)

    def test_what_is_not_held_out_is_measured_on_the_weights_in_training(self, run, averaged, tmp_path):
        run(tmp_path)
        for name in ("losses", "gradient_norm"):
            assert [r[name] for r in records(tmp_path)] == [r[name] for r in records(averaged(SWA))]

    @pytest.mark.parametrize("average", [SWA, EMA], ids=["equal", "exponential"])
    def test_a_run_stopped_every_few_steps_ends_as_one_never_stopped(
        self, run, network, averaged, tmp_path, average
    ):
        for part in itertools.count():
            module = network(norm=True, dropout=True, seed=part)
            try:
                run(tmp_path, stop=part % 3 + 1, resume=part > 0, module=module, average=average)
                break
            except Interrupted:
                assert not (tmp_path / "model.safetensors").exists()
        assert part > 5
        assert same(weights(tmp_path), weights(averaged(average)))
        assert records(tmp_path) == records(averaged(average))
        result = run(tmp_path, resume=True, average=average)[1]
        assert same(weights(tmp_path), weights(averaged(average)))
        assert same(result.model.state_dict(), weights(tmp_path))

    def test_another_average_is_another_run(self, run, averaged, tmp_path):
        with pytest.raises(Interrupted):
            run(tmp_path, stop=2, average=SWA)
        with pytest.raises(InputError, match=r"training\.average\.decay: none there, 0\.8 now"):
            run(tmp_path, resume=True, average=EMA)

    def test_a_network_for_smaller_balls_in_the_mean_is_warned_about(self, run, tmp_path):
        with pytest.warns(UserWarning, match=r"training\.average begins at 0\.3 .* eps has arrived at 0\.4"):
            run(tmp_path, average={"begin": 0.3}, epochs=1)

    def test_stages_that_train_different_layers_are_refused(self, run, tmp_path):
        with pytest.raises(InputError, match=r"training\.average: .* this one has 2"):
            run(tmp_path, methods.colt(eps=0.1), average=SWA)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("average", "said"),
        [
            ({}, "begin is missing"),
            ({"begin": 2}, "begin"),
            ({"begin": 0, "decay": 1}, "decay"),
            ({"start": 0}, "start"),
        ],
    )
    def test_options_without_sense_are_refused_by_name(self, average, said):
        content = {"method": {"name": "standard"}, "training": {"average": average}}
        with pytest.raises(InputError, match=rf"training\.average\.{said}"):
            parse_recipe(content, "the recipe")


class TestStatistics:
    def graph(self, module):
        return trace(module.train(), (1, 6, 6))

    def test_they_are_those_of_the_clean_training_examples(self, run, images, tmp_path):
        """The first layer's are known: nothing before it depends on a batch."""
        _, result = run(tmp_path, average=SWA)
        split = images(IMAGES)
        index, _ = hold_out(split.y, HELD_OUT, 0)
        z = result.model[0](split.x[index]).detach()
        norm = result.model[1]
        torch.testing.assert_close(norm.running_mean, z.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, z.var((0, 2, 3)), rtol=0.05, atol=0)

    def test_they_may_be_recomputed_without_an_average(self, run, raw, images, tmp_path):
        """At the end of each epoch, for the metrics and what is saved; the weights are those of any run."""
        _, result = run(tmp_path, bn_statistics="recompute")
        trained, expected = weights(tmp_path), copy.deepcopy(result.model)
        for name, _ in expected.named_parameters():
            assert torch.equal(trained[name], raw[-1][name])
        split = images(IMAGES)
        index, aside = hold_out(split.y, HELD_OUT, 0)
        z = expected[0](split.x[index]).detach()
        torch.testing.assert_close(expected[1].running_mean, z.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(raw[-1]["1.running_mean"], z.mean((0, 2, 3)), rtol=1e-3)
        correct = (expected(split.x[aside]).argmax(1) == split.y[aside]).float().mean().item()
        assert records(tmp_path)[-1]["held_out"]["clean"] == pytest.approx(correct)
        assert not any("averaged" in record for record in records(tmp_path))

    def test_a_stage_is_left_with_statistics_that_stay(self, run, network, tmp_path):
        """Also where a stage ends within an epoch, and where the run was stopped at that step."""
        method = methods.colt(eps=0.1, attack=LatentAttack(steps=2, projections=4))

        def go(name, stop=None, seed=0, **options):
            module = network(norm=True, seed=seed)
            run(tmp_path / name, method, stop, module, bn_statistics="recompute", epochs=3, **options)

        go("whole")
        first, end = (weights(tmp_path / "whole", name + "model.safetensors") for name in ("stages/1/", ""))
        assert all(torch.equal(first[name], end[name]) for name in end if int(name.split(".")[0]) < 3)
        with pytest.raises(Interrupted):
            go("parts", stop=10)  # 4 steps, 4 batches of statistics, 2 steps: the end of the first stage
        saved = load_tensors(tmp_path / "parts" / "checkpoint" / "last.safetensors")[1]
        assert saved["progress"]["step"] == 6
        go("parts", seed=1, resume=True)
        assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
        assert records(tmp_path / "parts") == records(tmp_path / "whole")

    def test_batches_count_by_their_size(self, network, images):
        module = network(norm=True)
        x = images(40).x
        recompute_statistics(self.graph(module), iter(x.split(16)))
        parts = [module[0](part).detach() for part in x.split(16)]
        means = sum(len(z) * z.mean((0, 2, 3)) for z in parts) / 40
        variances = sum(len(z) * z.var((0, 2, 3)) for z in parts) / 40
        torch.testing.assert_close(module[1].running_mean, means)
        torch.testing.assert_close(module[1].running_var, variances)

    def test_they_depend_on_nothing_but_weights_and_examples(self, network, images):
        """Neither on what was there before, nor on dropout."""
        modules = [network(norm=True, dropout=True) for _ in range(2)]
        modules[1][1].running_mean.fill_(7.0)
        for seed, module in enumerate(modules):
            module.insert(1, nn.Dropout(0.5))
            torch.manual_seed(seed)
            recompute_statistics(self.graph(module), iter(images(40).x.split(16)))
        assert same(*(module.state_dict() for module in modules))

    def test_the_network_is_left_in_the_mode_it_was_in(self, network, images):
        module = network(norm=True, dropout=True)
        graph, before = self.graph(module), copy.deepcopy(dict(module.named_parameters()))
        module[4].eval()
        recompute_statistics(graph, iter(images(40).x.split(16)))
        assert [m.training for m in module] == [m is not module[4] for m in module]
        assert [norm.momentum for norm in module if isinstance(norm, nn.BatchNorm2d)] == [0.1]
        assert same(dict(module.named_parameters()), before)

    def test_frozen_layers_keep_theirs(self, network, images):
        module = network(norm=True)
        graph = self.graph(module)
        before = copy.deepcopy(module.state_dict())
        with frozen_upto(graph, Layerwise().of(graph)[1].cut) as live:
            recompute_statistics(live, iter(images(40).x.split(16)))
        moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {f"5.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}

    def test_without_batch_norm_no_example_is_read(self, network):
        recompute_statistics(self.graph(network()), unread())


def unread():
    raise AssertionError
    yield
