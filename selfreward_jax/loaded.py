"""The models of a run in memory: one at a time, in the layout that is asked for, and the samplers over them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils

from selfreward_jax.config import OWN_JUDGES, Config, MeshConfig
from selfreward_jax.data.chat import Chat, load_chat
from selfreward_jax.errors import UserError, spelled
from selfreward_jax.model import kernels, llama
from selfreward_jax.model.config import LlamaConfig
from selfreward_jax.observe.progress import say
from selfreward_jax.run import Held, Run
from selfreward_jax.sampling import engine as engines
from selfreward_jax.sharding import choose
from selfreward_jax.sharding.mesh import Sizes, full_sizes, make_mesh, regrouped, shape_of
from selfreward_jax.sharding.place import move, rows_multiple
from selfreward_jax.sharding.rules import LAYOUTS, check_covered, check_divides, extents, shardings, table
from selfreward_jax.training import checkpoint
from selfreward_jax.weights.source import Source, load_params, open_source, param_bytes


def compute(run: Run, layout: str = "training") -> llama.Compute:
    """How the model runs while training or (without a backward pass) while sampling."""
    model = run.config.model
    remat = model.remat if layout == "training" else "none"
    return llama.Compute(model.compute_dtype, model.unroll, remat, run.attention, layout, _products())


def _products() -> str:
    """`Compute.products` for this host."""
    return "float32" if jax.default_backend() == "cpu" else ""


def attention_form(choice: str, model: LlamaConfig, dtype: str) -> str:
    """The form of attention for this job and model, and a line where a kernel can't take it (`kernels.choose`)."""
    form, line = kernels.choose(choice, jax.default_backend(), model.head_dim, dtype, _refusal)
    if line:
        say(line)
    return form


def _refusal(form: str, head_dim: int, dtype: str) -> str:
    """Why a host of this job does not compile a kernel, or "": all take the same form, or their programs differ."""
    why = kernels.refusal(form, head_dim, dtype)
    refusing = np.flatnonzero(multihost_utils.process_allgather(np.int32(bool(why))))
    return why or (f"{form} does not compile on the host of process {refusing[0]}" if refusing.size else "")


def training_mesh(config: Config, model: LlamaConfig) -> jax.sharding.Mesh:
    """The mesh that `mesh` names, or (three zeros) that the devices, the model and the smallest batch decide.

    Raises:
        UserError: if it does not fill the devices or does not divide the model.
    """
    axes, abstract = llama.logical_axes(model), llama.abstract(model)
    rows = min(config.sft.batch, config.dpo.batch)
    sizes = _named(config.mesh) or choose.training(jax.device_count(), extents(axes, abstract), rows)
    mesh = make_mesh(*sizes)
    check_divides(axes, abstract, mesh)
    for name, part in (("sft", config.sft), ("dpo", config.dpo)):
        if (rows := rows_multiple(mesh)) > part.batch:
            say(f"{name}.batch={part.batch}: at least {rows - part.batch} of {rows} rows, data x fsdp, are padding")
    return mesh


def generation_mesh(named: MeshConfig, source: Source, dtype: str, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The devices of `mesh` as sampling groups them: as the config names, or so that the weights just fit.

    Raises:
        UserError: as for `training_mesh`.
    """
    option, axes, abstract = (
        "--config.generation_mesh",
        llama.logical_axes(source.config),
        llama.abstract(source.config),
    )
    sizes, heads = _named(named), extents(axes, abstract)
    if not sizes:
        fitting = choose.generation(mesh.size, heads, param_bytes(source, dtype), choose.memory_of_a_device())
        return regrouped(mesh, fitting)
    sizes = full_sizes(sizes, option)
    grouped = regrouped(mesh, sizes)
    check_divides(axes, abstract, grouped, LAYOUTS["generation"][0], option)
    if not choose.whole_heads(sizes, heads):
        raise UserError(
            f"{option}: fsdp={sizes[1]} x tensor={sizes[2]} cuts the {heads['q_heads']} query heads across the"
            f" {heads['kv_heads']} kv heads that they read; take another tensor, or leave all three at 0"
        )
    return grouped


def _named(mesh: MeshConfig) -> Sizes | None:
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    return sizes if any(sizes) else None


def describe(run: Run) -> None:
    """Prints both meshes, and with several devices both tables of parameters."""
    config = run.source.config
    say(f"attention: {run.attention}")
    for layout in LAYOUTS:
        mesh, dtype = _place(run, layout)
        rules = LAYOUTS[layout][0]
        say(f"{layout} mesh {shape_of(mesh)}")
        if mesh.size == 1:
            continue
        axes = llama.logical_axes(config)
        share = check_covered(axes, abstract_params(run, layout), mesh, rules)
        say(f"  {share:.1%} of the parameter bytes are cut over devices")
        for name, shape, spec, size in table(axes, llama.abstract(config, dtype), mesh, rules):
            say(f"  {name:28} {shape:20} {spec:28} {size / 1e6:12,.3f} MB a device")


def _place(run: Run, layout: str) -> tuple[jax.sharding.Mesh, str]:
    """The mesh and the parameters' dtype of a layout."""
    if layout == "training":
        return run.mesh, run.config.model.param_dtype
    return run.generation_mesh, run.config.model.compute_dtype


def abstract_params(run: Run, layout: str = "training") -> llama.Params:
    """Shapes, dtype and shardings of the run's own parameters in a layout."""
    config = run.source.config
    mesh, dtype = _place(run, layout)
    placed = shardings(llama.logical_axes(config), mesh, LAYOUTS[layout][0])
    tree = llama.abstract(config, dtype)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placed)


def params_of(run: Run, model: str, layout: str = "training") -> llama.Params:
    """Parameters of "m0" (the source) or of a model that this run has trained; kept until others are asked for.

    Between the layouts they move on the devices, unless sampling's dtype has lost bits that training needs.

    Raises:
        UserError: if less than 98 % of their bytes lie over the mesh as the layout's table says.
    """
    held = run.held
    if held and held.model == model and held.layout == layout:
        return held.params
    run.held = None  # freed before the next is read: two copies of a 70B do not fit
    _, dtype = _place(run, layout)
    if held and held.model == model and (layout == "generation" or run.config.model.compute_dtype == dtype):
        target = jax.tree.map(lambda a: a.sharding, abstract_params(run, layout))
        params = move(held.params, target, dtype)
    else:
        held = None
        params = fresh_params(run, model, layout)
    check_covered(llama.logical_axes(run.source.config), params, _place(run, layout)[0], LAYOUTS[layout][0])
    run.held = Held(model, layout, params)
    return params


def fresh_params(run: Run, model: str, layout: str = "training") -> llama.Params:
    """As `params_of`, but always read anew: a copy of the caller's own."""
    if model == "m0":
        mesh, dtype = _place(run, layout)
        return load_params(run.source, mesh, dtype, LAYOUTS[layout][0])
    return checkpoint.load_params(run.root / model / "params", abstract_params(run, layout))


def take_params(run: Run, model: str) -> llama.Params:
    """`params_of` for a caller that donates them to training: nobody else holds them afterwards."""
    params = params_of(run, model)
    run.held = None
    return params


def engine(run: Run, model: str) -> engines.Engine:
    """A sampler over one of the run's own models."""
    return _engine(run, run.source, run.chat, params_of(run, model, "generation"), run.generation_mesh)


def open_fixed(name: str, option: str) -> Source:
    """`open_source` for a model that another option than `model.source` names."""
    with spelled({"--config.model.source": option}):
        return open_source(name)


def fixed_model(run: Run, name: str, option: str) -> tuple[engines.Engine, Chat]:
    """A sampler over a model fixed in advance (a prompt writer, a judge), with its own tokenizer and template.

    Another model's parameters are held in place of the run's own, in the compute dtype: they are never trained.
    """
    if name == run.config.model.source:
        return engine(run, "m0"), run.chat
    run.held = None
    source = open_fixed(name, option)
    chat = load_chat(source.tokenizer, "own" if source.tokenizer.chat_template else "llama2", source.eos_ids)
    dtype = run.config.model.compute_dtype
    mesh = generation_mesh(run.config.generation_mesh, source, dtype, run.mesh)
    form = attention_form(run.config.model.attention, source.config, dtype)  # its heads may be of another size
    say(f"{option}={name}: attention {form}, generation mesh {shape_of(mesh)}")
    params = load_params(source, mesh, dtype, LAYOUTS["generation"][0])
    return _engine(dataclasses.replace(run, attention=form), source, chat, params, mesh), chat


def prompt_writer(run: Run, before: str) -> tuple[engines.Engine, Chat]:
    """The model that writes new prompts: `prompts.model`, M0 itself, or `before`, the model in training (A.5)."""
    name = run.config.prompts.model
    if name == "current":
        return engine(run, before), run.chat
    return fixed_model(run, name or run.config.model.source, "--config.prompts.model")


def judge_model(run: Run, before: str) -> tuple[engines.Engine, Chat]:
    """The judge of `before`'s answers: `before` itself, or the one fixed in advance by `judge.model`."""
    name = run.config.judge.model
    if name in ("", *OWN_JUDGES):
        return engine(run, name or before), run.chat
    return fixed_model(run, name, "--config.judge.model")


def open_engine(source: Source, chat: Chat, dtype: str, rows: int, part: int, pad: int) -> engines.Engine:
    """A sampler over a model outside of a run, on all devices, as is fastest on them.

    Args:
        dtype: of the weights and the computation.
        rows, part, pad: see `Engine`.
    """
    mesh = generation_mesh(MeshConfig(), source, dtype, make_mesh(-1, 1, 1))
    form = attention_form("auto", source.config, dtype)
    reading = llama.Compute(dtype, remat="none", attention=form, layout="generation", products=_products())
    unroll = source.config.layers if jax.default_backend() == "cpu" else 1
    params = load_params(source, mesh, dtype, LAYOUTS["generation"][0])
    return _make_engine(source, chat, params, mesh, reading, unroll, rows, part, pad)


def _engine(run: Run, source: Source, chat: Chat, params: llama.Params, mesh: jax.sharding.Mesh) -> engines.Engine:
    config = run.config.engine
    return _make_engine(
        source, chat, params, mesh, compute(run, "generation"), run.config.model.decode_unroll, config.rows, config.part,
        config.pad,
    )  # fmt: skip


def _make_engine(
    source: Source, chat: Chat, params: llama.Params, mesh: jax.sharding.Mesh, reading: llama.Compute, unroll: int,
    rows: int, part: int, pad: int,
) -> engines.Engine:  # fmt: skip
    """A sampler over parameters in the generation layout.

    Args:
        unroll: layers a scan step while decoding; from all of them on nothing is scanned (`llama.apart`).
        rows, part, pad: see `Engine`.
    """
    decoding = dataclasses.replace(reading, unroll=min(unroll, source.config.layers))
    if decoding.unroll == source.config.layers:
        with jax.set_mesh(mesh):
            params = llama.apart(source.config, params)
    elif jax.default_backend() == "tpu":
        params = llama.heads_apart(params)
    # A CPU's steps cost as much as their rows; elsewhere they cost the reading of the weights, however few the rows.
    cached, narrowest = (rows * 5 // 4, 8) if jax.default_backend() == "cpu" else (rows, rows)
    return engines.Engine(
        source.config,
        reading,
        decoding,
        params,
        mesh,
        chat.stop_ids,
        chat.vocabulary,
        rows,
        cached,
        part,
        pad,
        narrowest,
    )
