"""Laws that every table obeys, derived from the tables themselves."""

from fractions import Fraction
from itertools import pairwise

import pytest

from loratools import archs
from loratools.archs import Arch, Component, Table
from loratools.archs._table import DIFFUSERS, NATIVE, swapped
from loratools.model import Rows

TABLED = [
    pytest.param(arch, component, id=f"{arch.name}-{component.name}")
    for arch in archs.all_archs().values()
    for component in arch.components
    if component.table is not None
]
NUMBERS = ("0", "7", "123")
# Native names that mean other weights in diffusers.
HOMONYMS = {("hunyuan_dit", "denoiser"): {"blocks_0_norm2", "blocks_0_norm3"}}


def dialects(component):
    return (NATIVE, DIFFUSERS, *component.table.further)


def every_name(component, number):
    """(dialect, name) of everything the component spells, with ``number`` in the holes."""
    for dialect in dialects(component):
        for names in component.table.spellings(dialect).values():
            for name in names:
                yield dialect, name, name.native.replace("%s", number), name.text.replace("%s", number)


def prefixes(component):
    return sorted({prefix for group in component.prefixes.values() for prefix in group})


@pytest.mark.parametrize(("arch", "component"), TABLED)
@pytest.mark.parametrize("number", NUMBERS)
def test_reading_a_name_gives_the_weight_that_it_was_spelt_from(arch, component, number):
    kohya = component.prefix("kohya")
    for dialect, name, path, dotted in every_name(component, number):
        for separator in "._":
            text = arch.spell(component.name, path, name.rows, dialect, separator)
            assert text == dotted.replace(".", separator)
            found = arch.resolve(kohya + text, dialect)
            assert (found.component, found.path, found.rows) == (component.name, path, name.rows)
            assert found.prefix == kohya
            if "." in dotted:
                assert found.separator == separator


@pytest.mark.parametrize(("arch", "component"), TABLED)
def test_a_read_name_is_spelt_as_it_was(arch, component):
    for prefix in prefixes(component):
        for _, _, _, dotted in every_name(component, "3"):
            for separator in "._":
                stem = prefix + dotted.replace(".", separator)
                found = arch.resolve(stem)
                text = arch.spell(found.component, found.path, found.rows, found.dialect, found.separator)
                assert found.prefix + text == stem


@pytest.mark.parametrize(
    "arch", [arch for arch in archs.all_archs().values() if arch.has_table], ids=lambda a: a.name
)
def test_a_wrapper_for_any_model_puts_its_prefix_before_diffusers_flattened_names(arch):
    for dialect, name, path, dotted in every_name(arch.components[0], "1"):
        if dialect == DIFFUSERS:
            found = arch.resolve("lycoris_" + dotted.replace(".", "_"))
            assert (found.component, found.path, found.rows) == ("denoiser", path, name.rows)
            assert (found.prefix, found.separator) == ("lycoris_", "_")


@pytest.mark.parametrize(("arch", "component"), TABLED)
def test_every_prefix_of_a_component_means_it(arch, component):
    shared_with_the_denoiser = {"base_model.model."} if component is not arch.components[0] else set()
    for prefix in set(prefixes(component)) - shared_with_the_denoiser:
        for dialect, name, path, dotted in every_name(component, "0"):
            found = arch.resolve(prefix + dotted, dialect)
            assert (found.component, found.path) == (component.name, path), (prefix, dialect, name)


@pytest.mark.parametrize(
    "arch", [arch for arch in archs.all_archs().values() if arch.has_table], ids=lambda a: a.name
)
def test_only_the_denoiser_goes_without_a_prefix(arch):
    denoiser, *others = arch.components
    assert all(arch.resolve(dotted) for _, _, _, dotted in every_name(denoiser, "0"))
    own = {dotted for _, _, _, dotted in every_name(denoiser, "0")}
    for component in others:
        for _, _, _, dotted in every_name(component, "0"):
            assert dotted in own or arch.resolve(dotted) is None


@pytest.mark.parametrize(("arch", "component"), TABLED)
def test_no_two_rows_claim_one_name(arch, component):
    for separator in "._":
        claims = {}
        for dialect, name, path, dotted in every_name(component, "0"):
            claims.setdefault((dialect, dotted.replace(".", separator)), set()).add((path, name.rows))
        assert [name for name, weights in claims.items() if len(weights) > 1] == []


@pytest.mark.parametrize(("arch", "component"), TABLED)
def test_dialects_use_one_name_for_different_weights_only_where_it_is_said_here(arch, component):
    claims = {}
    for _, name, path, dotted in every_name(component, "0"):
        claims.setdefault(dotted.replace(".", "_"), set()).add((path, name.rows))
    homonyms = {name for name, weights in claims.items() if len(weights) > 1}
    assert homonyms == HOMONYMS.get((arch.name, component.name), set())
    assert component.table.homonyms == homonyms


@pytest.mark.parametrize(("arch", "component"), TABLED)
def test_the_pieces_of_a_weight_make_up_the_whole_of_it(arch, component):
    for dialect in dialects(component):
        for native in component.table.spellings(dialect):
            path = native.replace("%s", "2")
            if (arch.name, dialect, native) == ("flux", "xlabs", "single_blocks.%s.linear1"):
                continue  # XLabs adapts the attention alone, and has no name for the MLP's rows
            pieces = arch.pieces(component.name, path, dialect)
            if pieces == (None,):
                continue
            covered = sorted(
                (Fraction(start, rows.of), Fraction(stop, rows.of))
                for rows in pieces
                for start, stop in rows.spans
            )
            assert covered[0][0] == 0
            assert covered[-1][1] == 1
            assert all(one[1] == other[0] for one, other in pairwise(covered))


@pytest.mark.parametrize(("arch", "component"), TABLED)
def test_native_names_take_whole_weights(arch, component):
    for native in component.table.spellings(NATIVE):
        assert arch.pieces(component.name, native.replace("%s", "0"), NATIVE) == (None,)


@pytest.mark.parametrize(("arch", "component"), TABLED)
def test_names_near_a_tables_names_mean_nothing(arch, component):
    prefix = component.prefix("kohya")
    for _, _, _, dotted in every_name(component, "0"):
        assert arch.resolve(prefix + dotted + ".extra") is None
        assert arch.resolve(prefix + "extra." + dotted) is None
        assert arch.resolve(prefix + dotted + "#") is None
        if "_" in dotted:
            assert arch.resolve(prefix + dotted.replace("_", ".", 1)) is None


def test_tables_accept_tuples_weights_rows_and_exchanged_halves():
    pieces = (("c", Rows(((2, 3), (0, 1)), of=4)), ("d", Rows(((1, 2), (3, 4)), of=4)))
    table = Table((("n.{}.a", ("q.{}", ("k.{}", 3))), ("n.{}.b", pieces), ("n.{}.m", swapped("s.{}"))))
    assert table.pieces("n.4.a", DIFFUSERS) == (Rows(((0, 1),), of=4), Rows(((1, 4),), of=4))
    assert table.pieces("n.4.b", DIFFUSERS) == tuple(rows for _, rows in pieces)
    assert table.pieces("n.4.m", DIFFUSERS) == (Rows(((1, 2), (0, 1)), of=2),)
    assert table.spell("n.4.m", None, DIFFUSERS) is None
    assert table.spell("n.4.a", Rows(((1, 4),), of=4), DIFFUSERS) == "k.4"
    assert table.pieces("n.4.z", DIFFUSERS) == ()
    assert table.pieces("k.4", DIFFUSERS) == ()


def test_a_table_whose_rows_claim_one_name_is_refused():
    with pytest.raises(ValueError, match=r"to_q names both one\.%s and two\.%s"):
        _ = Table((("one.{}", "{}.to_q"), ("two.{}", "{}.to_q"))).index


def test_a_column_may_name_a_few_weights_and_then_names_no_others():
    table = Table((("n.{}.a", ("q.{}", "k.{}")), ("n.{}.b", "b.{}")), {"partial": (("n.{}.a", "p.{}.a"),)})
    assert table.spell("n.4.a", None, "partial") == "p.4.a"
    assert table.spell("n.4.b", None, "partial") is None
    assert table.pieces("n.4.b", "partial") == ()
    assert list(table.spellings("partial")) == ["n.%s.a"]
    assert table.spellings("other") == table.spellings(DIFFUSERS)
    toy = Arch("toy", "toy", (Component("denoiser", {"kohya": ("lora_unet_",)}, table),))
    assert toy.resolve("p.4.a").dialect == "partial"


EXCHANGED = Arch(
    "toy",
    "toy",
    (
        Component(
            "denoiser",
            {"kohya": ("lora_unet_",), "diffusers": ("transformer.",), "comfy": ("diffusion_model.",)},
            Table(
                (
                    ("n.{}.one", "n.{}.two"),
                    ("n.{}.two", "n.{}.one"),
                    ("n.{}.own", "n.{}.its"),
                    ("n.{}.alike", None),
                )
            ),
            kohya_dialect=DIFFUSERS,
        ),
    ),
)


@pytest.mark.parametrize(
    ("prefix", "dialect"),
    [
        ("lora_unet_", DIFFUSERS),
        ("transformer.", DIFFUSERS),
        ("lycoris_", DIFFUSERS),
        ("diffusion_model.", NATIVE),
        ("", NATIVE),
    ],
)
def test_a_name_of_two_weights_is_read_in_the_dialect_that_its_prefix_implies(prefix, dialect):
    separator = "_" if prefix.endswith("_") else "."
    name = prefix + "n.3.one".replace(".", separator)
    meant = {NATIVE: "n.3.one", DIFFUSERS: "n.3.two"}
    found = EXCHANGED.resolve(name)
    assert (found.path, found.dialect) == (meant[dialect], dialect)
    assert EXCHANGED.resolve_all([name, prefix + "n.3.alike".replace(".", separator)])[name] == found
    for other in (NATIVE, DIFFUSERS):
        assert EXCHANGED.resolve(name, other).path == meant[other]


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", ""])
@pytest.mark.parametrize(("others", "path"), [(["own"], "n.3.one"), (["its"], "n.3.two")])
def test_a_name_of_two_weights_is_read_in_the_dialect_of_the_files_other_names(prefix, others, path):
    separator = "_" if prefix.endswith("_") else "."
    stems = [prefix + f"n.3.{part}".replace(".", separator) for part in ["one", *others]]
    for order in (stems, stems[::-1]):
        assert EXCHANGED.resolve_all(order)[stems[0]].path == path
    assert EXCHANGED.resolve_all([stems[0], "n.3.own", "n.3.its"])[stems[0]] == EXCHANGED.resolve(stems[0])


def test_a_literal_number_is_preferred_to_a_hole():
    table = Table((("blocks.{}.mod", None), ("blocks.23.mod", "last.mod")))
    denoiser = Component("denoiser", {"kohya": ("lora_unet_",)}, table)
    arch = Arch("toy", "toy", (denoiser,))
    assert arch.spell("denoiser", "blocks.23.mod", None, DIFFUSERS) == "last.mod"
    assert arch.spell("denoiser", "blocks.22.mod", None, DIFFUSERS) == "blocks.22.mod"
    assert arch.resolve("lora_unet_last_mod").path == "blocks.23.mod"


def test_shared_names_are_said_to_be_in_the_dialect_of_kohya_files():
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    assert archs.get("flux").resolve(stem).dialect == DIFFUSERS
    assert archs.get("sdxl").resolve("lora_unet_out_2").dialect == NATIVE


@pytest.mark.parametrize(
    ("name", "component", "dialect"),
    [
        ("sd15", "denoiser", DIFFUSERS),
        ("sd2", "denoiser", DIFFUSERS),
        ("sdxl", "denoiser", NATIVE),
        ("flux", "denoiser", NATIVE),
        ("sd15", "text_encoder", DIFFUSERS),
        ("sdxl", "text_encoder_2", DIFFUSERS),
        ("flux", "text_encoder_2", DIFFUSERS),
    ],
)
def test_the_dialect_of_kohya_files(name, component, dialect):
    assert archs.get(name).component(component).kohya_dialect == dialect


def test_architectures_have_a_denoiser_first_or_no_table():
    for arch in archs.all_archs().values():
        assert arch.has_table == (arch.components[0].name == "denoiser")
        assert len({component.name for component in arch.components}) == len(arch.components)
        for rule in arch.widths:
            table = arch.component(rule.component).table
            paths = [native.replace("%s", "0") for native in table.spellings(NATIVE)]
            for tail in rule.tails:
                assert any(path.endswith("." + tail) for path in paths), (arch.name, tail)
