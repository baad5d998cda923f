"""Names of sites."""

import pytest

from jaxsteer import UserError, parse_site, resid_site
from jaxsteer.models.sites import BLOCK_PLACES


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hook_embed", "hook_embed"),
        ("blocks.2.hook_resid_post", "blocks.2.hook_resid_post"),
        ("blocks.-1.attn.hook_z", "blocks.3.attn.hook_z"),
        ("resid_post_layer_1", "blocks.1.hook_resid_post"),
        ("layers.3", "blocks.3.hook_resid_post"),
        ("model.layers.0", "blocks.0.hook_resid_post"),
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


@pytest.mark.parametrize("place", BLOCK_PLACES)
def test_every_place_is_a_name(place: str) -> None:
    assert parse_site(f"blocks.1.{place}", 4).place == place


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("blocks.4.hook_resid_post", "0 to 3"),
        ("blocks.-5.hook_resid_post", "0 to 3"),
        ("L17R", "beyond the last layer"),
        ("hidden_states[4]", "final norm"),
        ("hidden_states[-1]", "blocks.3.hook_resid_post"),
        ("blocks.1.attn.hook_rot_q", "attn.hook_pattern"),
        ("14", "not the name of a site"),
        ("", "not the name of a site"),
    ],
)
def test_mistakes_are_explained(text: str, says: str) -> None:
    with pytest.raises(UserError, match="(?s).*".join(says.split("|"))):
        parse_site(text, 4)


def test_resid_site() -> None:
    assert parse_site(resid_site(3), 4).layer == 3
