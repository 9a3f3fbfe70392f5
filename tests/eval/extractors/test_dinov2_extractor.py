"""DINOv2 from transformers', torch.hub's and timm's layouts, prepared as dgm-eval does it."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms
from transformers import Dinov2Config, Dinov2Model

from stepdistill.data.arrays import read_array_images
from stepdistill.errors import UserError
from stepdistill.eval.extractors import dinov2
from stepdistill.eval.extractors.dinov2 import MEAN, STD, load_dinov2
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.reference_statistics import make_reference


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=70, patch_size=14
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():  # else the norms and scales are ones, and a mistake in them would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "transformers"
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (3, 3, 40, 56), generator=torch.Generator().manual_seed(0)).byte()


def test_features_are_the_class_token_of_the_picture_as_dgm_eval_prepares_it(network, folder, pictures):
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    inputs = torch.stack([prepare(Image.fromarray(picture.permute(1, 2, 0).numpy())) for picture in pictures])
    with torch.no_grad():
        expected = network(inputs).last_hidden_state[:, 0]
    extractor = load_extractor(f"dinov2:{folder}")
    torch.testing.assert_close(extractor(pictures), expected)
    assert (extractor.metric, extractor.num_features) == ("frechet[dinov2_width64]", 64)
    grey = extractor(pictures[:, :1])
    torch.testing.assert_close(grey, extractor(pictures[:, :1].repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(("layers", "metric"), [(24, "FD-DINOv2"), (12, "frechet[dinov2_vitl14]")])
def test_only_dgm_evals_architecture_is_called_fd_dinov2(tmp_path, monkeypatch, layers, metric):
    small = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
    small.config.hidden_size, small.config.num_hidden_layers = 1024, layers  # what it says of itself
    monkeypatch.setattr(dinov2, "_load_transformers", lambda _folder, _kind: small)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    extractor = load_dinov2(tmp_path)
    assert extractor.metric == metric
    assert extractor.kernel_metric == ("KD-DINOv2" if layers == 24 else "kid[dinov2_vitl14]")


def test_timms_own_network_gives_the_same_features(tmp_path, pictures):
    """Its file, read by us, against its forward pass."""
    timm = pytest.importorskip("timm", reason="timm comes with open_clip, an optional package")
    torch.manual_seed(1)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=14, embed_dim=64, depth=2, num_heads=1, mlp_ratio=2, init_values=0.5, num_classes=0
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny"}')  # timm's own, of no use here
    extractor = load_dinov2(tmp_path)
    arrays = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    prepare = transforms.Compose(
        [transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC), transforms.ToTensor()]
    )
    inputs = transforms.Normalize(MEAN, STD)(torch.stack([prepare(array) for array in arrays]))
    with torch.no_grad():
        expected = model.forward_features(inputs)[:, 0]
    torch.testing.assert_close(extractor(pictures), expected, rtol=1e-4, atol=1e-4)


def test_torch_hubs_file_is_read_and_the_fingerprint_knows_the_weights(network, folder, tmp_path, pictures):
    state = network.state_dict()
    hub = {"cls_token": state["embeddings.cls_token"], "mask_token": state["embeddings.mask_token"]}
    hub["pos_embed"] = state["embeddings.position_embeddings"]
    for kind in ("weight", "bias"):
        hub[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        hub[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(2):
            hub_key, key = f"blocks.{i}", f"encoder.layer.{i}"
            parts = [state[f"{key}.attention.{part}_proj.{kind}"] for part in "qkv"]
            hub[f"{hub_key}.attn.qkv.{kind}"] = torch.cat(parts)
            hub[f"{hub_key}.attn.proj.{kind}"] = state[f"{key}.attention.o_proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                hub[f"{hub_key}.{name}.{kind}"] = state[f"{key}.{name}.{kind}"]
            for which in "12":
                hub[f"{hub_key}.ls{which}.gamma"] = state[f"{key}.layer_scale{which}.lambda1"]
    torch.save(hub, tmp_path / "hub.pth")
    first, second = load_dinov2(folder), load_dinov2(tmp_path / "hub.pth")
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first(pictures), second(pictures))
    hub["norm.bias"] = hub["norm.bias"] + 1
    torch.save(hub, tmp_path / "hub.pth")
    assert load_dinov2(tmp_path).fingerprint != first.fingerprint


def test_a_reference_made_with_it_measures(folder):
    arrays = torch.randint(0, 256, (6, 20, 20, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    images = read_array_images(arrays, None, (3, 20, 20), False, "noise")
    extractor = load_dinov2(folder)
    reference = make_reference(images, extractor, batch_size=4)
    reference.check(extractor, (3, 999, 999))  # it resizes, so any size goes
    shown = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    assert reference.frechet(extractor(shown)) == pytest.approx(0, abs=1e-6)
    assert reference.frechet(extractor(shown // 2)) > 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; download facebook/dinov2-large"),
        ({"config.json": {"model_type": "vit"}}, "is a model of type vit, not dinov2"),
        ({"config.json": {"model_type": "dinov2"}}, "is no DINOv2"),
        ({"config.json": {}}, "holds 0 files of weights, one is needed"),
        ({"weights.pth": {"x": torch.zeros(1)}}, "is not torch.hub's or timm's DINOv2"),
        ({"weights.pth": "registers"}, "has registers or a gated MLP"),
    ],
)
def test_what_is_not_dinov2_is_one_line(tmp_path, content, message):
    place = tmp_path / "given"
    for name, value in (content or {}).items():
        place.mkdir(exist_ok=True)
        if name.endswith(".json"):
            (place / name).write_text(json.dumps(value))
            continue
        if value == "registers":
            keys = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma", "norm.weight")
            value = dict.fromkeys((*keys, "register_tokens"), torch.zeros(1))
        torch.save(value, place / name)
    with pytest.raises(UserError) as error:
        load_dinov2(place)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
