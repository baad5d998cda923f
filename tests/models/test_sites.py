"""Names of sites."""

import re
from pathlib import Path

import pytest

from jaxsteer import UserError, parse_site, resid_site
from jaxsteer.models.sites import KINDS, Site, alias, every_layer, find_sites
from tests.helpers.checkpoints import tiny_config


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hook_embed", "hook_embed"),
        ("blocks.2.hook_resid_post", "blocks.2.hook_resid_post"),
        ("blocks.-1.attn.hook_z", "blocks.3.attn.hook_z"),
        ("resid_post_layer_1", "blocks.1.hook_resid_post"),
        ("layers.3", "blocks.3.hook_resid_post"),
        ("model.layers.0", "blocks.0.hook_resid_post"),
        ("model.language_model.layers.1.output", "blocks.1.hook_resid_post"),
        ("model.layers.3.self_attn", "blocks.3.attn.hook_out"),
        ("model.layers.-2.mlp.down_proj.input", "blocks.2.mlp.hook_post"),
        ("resid_post.3", "blocks.3.hook_resid_post"),
        ("attn_out_post.0", "blocks.0.hook_attn_out"),
        ("ln_final.hook_scale", "ln_final.hook_scale"),
        ("layer_2", "blocks.2.hook_resid_post"),
        ("L1R", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_in", "blocks.1.hook_resid_pre"),
        ("hidden_states[0]", "blocks.0.hook_resid_pre"),
        ("hidden_states[3]", "blocks.3.hook_resid_pre"),
        ("hidden_states[-2]", "blocks.3.hook_resid_pre"),
        (" layers.-4 ", "blocks.0.hook_resid_post"),
    ],
)
def test_names_and_aliases(text: str, name: str) -> None:
    site = parse_site(text, 4)
    assert site.name == name
    assert parse_site(site.name, 4) == site


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_name_and_its_aliases_lead_back(kind: str) -> None:
    site = Site(2 if KINDS[kind].in_block else 0, kind)
    assert parse_site(site.name, 4) == parse_site(site.name) == site
    for tool, has in (("nnsight", KINDS[kind].module), ("interp-engine", KINDS[kind].point)):
        if has:
            assert parse_site(alias(site, tool), 4) == site
        else:
            with pytest.raises(UserError, match=f"{tool} has no name"):
                alias(site, tool)


def test_the_table_in_the_docs_is_this_one() -> None:
    text = Path("docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| \[([A-Z1, ]+)\] \| .* \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    quoted = lambda name: f"`{name}`" if name else ""  # noqa: E731
    assert rows == [
        (
            name,
            ", ".join(kind.axes.split()),
            "on request" * kind.on_request,
            quoted(kind.module),
            quoted(kind.point),
        )
        for name, kind in KINDS.items()
    ]


def test_wildcards_and_what_a_model_has() -> None:
    llama = tiny_config()
    found = find_sites(["blocks.*.attn.hook_z", "L-1R", "model.layers.*.mlp"], llama)
    assert list(found) == [f"blocks.{i}.attn.hook_z" for i in range(3)] + ["L-1R"] + [
        f"blocks.{i}.mlp.hook_out" for i in range(3)
    ]
    assert found["L-1R"] == Site(2, "hook_resid_post") and every_layer("L1R") is None
    with pytest.raises(UserError, match="no ln1_post.hook_scale"):
        find_sites(["blocks.*.ln1_post.hook_scale"], llama)


def test_where_a_value_is_known() -> None:
    assert [parse_site(name, 4).depth(4) for name in ("hook_embed", "blocks.1.attn.hook_z", "ln_final.hook_scale")] == [
        0,
        2,
        4,
    ]
    assert Site(2, "hook_resid_pre").as_stream() == Site(1, "hook_resid_post")
    assert Site(0, "hook_resid_pre").as_stream() == Site(0, "hook_embed")
    assert Site(1, "hook_resid_mid").as_stream() == Site(1, "hook_resid_mid")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("blocks.4.hook_resid_post", "0 to 3"),
        ("blocks.-5.hook_resid_post", "0 to 3"),
        ("L17R", "beyond the last layer"),
        ("blocks." + "9" * 5000 + ".hook_resid_post", "so many digits"),
        ("hidden_states[4]", "final norm"),
        ("hidden_states[-1]", "blocks.3.hook_resid_post"),
        ("blocks.1.attn.hook_rot", "attn.hook_pattern"),
        ("blocks.1.ln_final.hook_scale", "names no place"),
        ("model.layers.1.norm", "not the name of a site"),
        ("14", "not the name of a site"),
        ("blocks.01.hook_resid_post", "not the name of a site"),
        ("blocks.\u0661.hook_resid_post", "not the name of a site"),
        ("layer_-0", "not the name of a site"),
        ("", "not the name of a site"),
    ],
)
def test_mistakes_are_explained(text: str, says: str) -> None:
    with pytest.raises(UserError, match="(?s).*".join(says.split("|"))):
        parse_site(text, 4)


def test_resid_site() -> None:
    assert parse_site(resid_site(3), 4).layer == 3
