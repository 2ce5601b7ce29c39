"""Keys: who is let in, what the file may say, and that no secret comes out again."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path

import pytest
from gateway import write_keys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from server.admission.keys import ANONYMOUS, ApiKey, ApiKeys, KeyFileError
from server.errors import AuthenticationError
from server.settings import Settings

FILE = f"""
[keys.shop]
secret = "shop-secret"
max_budget = "medium"
requests_per_minute = 60
images_per_minute = 100
weight = 4
max_parallel_requests = 8

[keys."lab.2_b-c"]
secret_sha256 = "{sha256(b"lab-secret").hexdigest().upper()}"
max_budget = 700

[keys.plain]
secret = "plain-secret"
"""


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_keys(tmp_path, FILE)


@pytest.fixture
def keys(key_file: Path) -> ApiKeys:
    return ApiKeys.from_settings(Settings(api_keys_file=key_file))


def read(path: Path, content: str | bytes) -> ApiKeys:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    return ApiKeys.from_settings(Settings(api_keys_file=path))


def test_each_secret_opens_its_own_key(keys: ApiKeys) -> None:
    assert not keys.is_open
    assert keys.authenticate("Bearer shop-secret") == ApiKey("shop", 320, 60, 100, 4, 8)
    assert keys.authenticate("Bearer lab-secret") == ApiKey("lab.2_b-c", 700)
    assert keys.authenticate("Bearer plain-secret") == ApiKey("plain", "full", None, None)


def test_key_of_the_environment_stands_beside_those_of_the_file(key_file: Path) -> None:
    keys = ApiKeys.from_settings(Settings(api_key=SecretStr("one"), api_keys_file=key_file))
    assert keys.authenticate("Bearer one") == ApiKey("default")
    assert keys.authenticate("Bearer shop-secret").name == "shop"


@pytest.mark.parametrize("header", ["bearer plain-secret", "BEARER   plain-secret", " Bearer plain-secret \t"])
def test_scheme_in_any_case_and_any_number_of_spaces(keys: ApiKeys, header: str) -> None:
    assert keys.authenticate(header).name == "plain"


@pytest.mark.parametrize("header", [None, "", " ", "Bearer", "Bearer  ", "plain-secret", "Basic plain-secret"])
def test_no_key_is_told_how_to_send_one(keys: ApiKeys, header: str | None) -> None:
    with pytest.raises(AuthenticationError, match="Authorization: Bearer") as caught:
        keys.authenticate(header)
    assert (caught.value.code, caught.value.status) == ("missing_api_key", 401)


@pytest.mark.parametrize("sent", ["Plain-secret", "plain-secre", "plain-secret2", "plain-secret shop-secret", "plain"])
def test_wrong_key_is_refused_and_not_repeated(keys: ApiKeys, sent: str) -> None:
    with pytest.raises(AuthenticationError) as caught:
        keys.authenticate(f"Bearer {sent}")
    assert caught.value.code == "invalid_api_key"
    assert sent not in str(caught.value.body())


def test_digest_of_a_key_is_no_key(keys: ApiKeys) -> None:
    with pytest.raises(AuthenticationError):
        keys.authenticate("Bearer " + sha256(b"lab-secret").hexdigest())


ODD_KEYS = ApiKeys([(sha256(b"right").digest(), ApiKey("right"))])


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())) | st.binary().map(lambda raw: raw.decode("latin-1")))
@example("\udcff")
@example("\x00")
def test_odd_headers_are_refused_and_nothing_else(text: str) -> None:
    for header in (text, f"Bearer {text}", f"Bearer right{text or '!'}x"):
        with pytest.raises(AuthenticationError):
            ODD_KEYS.authenticate(header)


def test_open_server_lets_everybody_in_whatever_they_send() -> None:
    keys = ApiKeys.from_settings(Settings())
    assert keys.is_open
    for header in (None, "", "Bearer EMPTY", "Basic \udcff"):
        assert keys.authenticate(header) is ANONYMOUS


def test_no_secret_in_what_is_printed(keys: ApiKeys) -> None:
    key = keys.authenticate("Bearer shop-secret")
    for text in (repr(key), repr(keys), repr(vars(keys))):
        assert "secret" not in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "keys: Field required"),
        ("[keys]", "at least 1 item"),
        ("keys = 5", "keys"),
        ("[keys]\nshop = 'hush-hush'", "keys.shop"),
        ("[keys.shop]\nsecret = 'hush-hush'\n[other]", "other is an unknown field"),
        ("[keys.shop", "is not TOML"),
        (b"[keys.shop]\nsecret = '\xff'", "is not TOML"),
        ("[keys.shop]", "'shop': give either secret or secret_sha256"),
        (f"[keys.shop]\nsecret = 'hush-hush'\nsecret_sha256 = '{'0' * 64}'", "give either"),
        ("[keys.shop]\nsecret = ''", "'shop': the secret is empty"),
        ("[keys.shop]\nsecret = 'hush hush'", "printable ASCII"),
        ("[keys.shop]\nsecret = 'hush-hush\u00e9'", "printable ASCII"),
        ("[keys.shop]\nsecret = 12345", "secret: Input should be a valid string"),
        ("[keys.shop]\nsecret_sha256 = 'hush-hush'", "64 hexadecimal digits"),
        (f"[keys.shop]\nsecret_sha256 = '{sha256(b'').hexdigest()}'", "is empty"),
        ("[keys.shop]\nsecret = 'hush-hush'\nrequest_per_minute = 5", "'shop': request_per_minute is an unknown field"),
        ("[keys.shop]\nsecret = 'hush-hush'\nrequests_per_minute = 0", "requests_per_minute: a rate must be"),
        ("[keys.shop]\nsecret = 'hush-hush'\nimages_per_minute = true", "images_per_minute: a rate must be"),
        ("[keys.shop]\nsecret = 'hush-hush'\nimages_per_minute = 1.5", "images_per_minute: a rate must be"),
        ("[keys.shop]\nsecret = 'hush-hush'\nweight = 0", "weight: a weight must be a whole number from 1 to 1000"),
        ("[keys.shop]\nsecret = 'hush-hush'\nweight = 1.5", "weight: a weight must be"),
        ("[keys.shop]\nsecret = 'hush-hush'\nmax_parallel_requests = 0", "max_parallel_requests: a limit of parallel"),
        ("[keys.shop]\nsecret = 'hush-hush'\nmax_budget = 31", "max_budget: a visual token budget must be"),
        ("[keys.shop]\nsecret = 'hush-hush'\nmax_budget = 'lots'", "'low' \\(160\\)"),
        ("[keys.'my shop']\nsecret = 'hush-hush'", "a name must be"),
        ("[keys.'']\nsecret = 'hush-hush'", "a name must be"),
        (f"[keys.{'n' * 65}]\nsecret = 'hush-hush'", "a name must be"),
        ("[keys.shop]\nsecret = 'hush-hush'\n[keys.shop]\nsecret = 'b'", "is not TOML"),
        (
            "[keys.shop]\nsecret = 'hush-hush'\n[keys.lab]\nsecret = 'hush-hush'",
            "'shop' and 'lab' have the same secret",
        ),
    ],
)
def test_bad_file_is_refused_with_its_place(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(KeyFileError, match=complaint) as caught:
        read(path, content)
    assert str(path) in str(caught.value) or "same secret" in complaint
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(KeyFileError, match="cannot be read") as caught:
            ApiKeys.from_settings(Settings(api_keys_file=path))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("secret", ["", "two words", "line\n"])
def test_unusable_key_of_the_environment_does_not_open_the_server(secret: str) -> None:
    with pytest.raises(KeyFileError, match="api_key"):
        ApiKeys.from_settings(Settings(api_key=SecretStr(secret)))


def test_name_and_secret_of_the_environment_are_taken(tmp_path: Path) -> None:
    settings = {"api_key": SecretStr("one"), "api_keys_file": tmp_path / "keys.toml"}
    for content in ("[keys.default]\nsecret = 'two'", "[keys.shop]\nsecret = 'one'"):
        (tmp_path / "keys.toml").write_text(content)
        (tmp_path / "keys.toml").chmod(0o600)
        with pytest.raises(KeyFileError, match=r"'default'.*(api_key|same secret)"):
            ApiKeys.from_settings(Settings(**settings))


def test_file_open_to_other_users_is_warned_about(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(api_keys_file=key_file)
    with caplog.at_level(logging.WARNING):
        ApiKeys.from_settings(settings)
        assert not caplog.messages
        key_file.chmod(0o644)
        assert not ApiKeys.from_settings(settings).is_open
    assert str(key_file) in caplog.messages[0]
    assert "shop-secret" not in caplog.text
