"""Tokens of an identity provider: believed when it has signed them for this server, or not."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hvp_service.app.config import ServerConfig
from hvp_service.calls.errors import ServiceError
from hvp_service.identity.tokens import TokenKeysError, TokenVerifier, read_keys

ISSUER, AUDIENCE = "https://id.example", "hvp"
PRIVATE: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
STRANGER = ec.generate_private_key(ec.SECP256R1())


def key_set(folder: Path, *algorithms: str) -> Path:
    entries = [
        json.loads(jwt.get_algorithm_by_name(name).to_jwk(PRIVATE[name].public_key()))
        | {"kid": name, "use": "sig"}
        for name in algorithms
    ]
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": entries}))
    return path


def verifier(path: Path) -> TokenVerifier:
    return TokenVerifier(ServerConfig(jwt_keys=path, jwt_issuer=ISSUER, jwt_audience=AUDIENCE))


def claims(**changes: Any) -> dict[str, Any]:
    usual = {
        "sub": "ada",
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": time.time() + 60,
        "hvp_project": "vision",
        "hvp_role": "submit",
    }
    return {name: value for name, value in (usual | changes).items() if value is not None}


def token(algorithm: str = "ES256", key: Any = None, kid: str | None = "", **changes: Any) -> str:
    headers = {} if kid is None else {"kid": kid or algorithm}
    return jwt.encode(claims(**changes), key or PRIVATE[algorithm], algorithm, headers=headers)


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_whoever_the_issuer_signed_for_is_believed(algorithm: str, tmp_path: Path) -> None:
    found = verifier(key_set(tmp_path, *PRIVATE)).identity(token(algorithm))
    assert (found.kind, found.subject, found.role) == ("token", "ada", "submit")
    assert found.projects == frozenset(["vision"])
    pem = tmp_path / "key.pem"
    pem.write_bytes(
        PRIVATE[algorithm]
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    assert verifier(pem).identity(token(algorithm)).subject == "ada"


def test_a_token_names_one_project_several_or_all(tmp_path: Path) -> None:
    believing = verifier(key_set(tmp_path, "ES256"))
    assert believing.identity(token(hvp_project=["a", "b"])).projects == frozenset("ab")
    assert believing.identity(token(hvp_project="-")).projects is None


def _unsigned() -> str:
    return jwt.encode(claims(), "", algorithm="none")


def _confused() -> str:
    """Signed with the public key as if it were a shared secret."""
    public = PRIVATE["RS256"].public_key()
    secret = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = {"alg": "HS256", "typ": "JWT", "kid": "RS256"}
    parts = [jwt.utils.base64url_encode(json.dumps(each).encode()) for each in (head, claims())]
    signature = hmac.digest(secret, b".".join(parts), "sha256")
    return b".".join([*parts, jwt.utils.base64url_encode(signature)]).decode()


FORGED: dict[str, Callable[[], str]] = {
    "of a stranger": lambda: token(key=STRANGER),
    "of a stranger, without a key id": lambda: token(key=STRANGER, kid=None),
    "of a key that is not there": lambda: token(kid="other"),
    "unsigned": _unsigned,
    "of a shared secret": _confused,
    "for another server": lambda: token(aud="else"),
    "of another issuer": lambda: token(iss="https://evil.example"),
    "for ever": lambda: token(exp=None),
    "for nobody": lambda: token(sub=None),
    "without an audience": lambda: token(aud=None),
    "not yet": lambda: token(nbf=time.time() + 3600),
    "of no project": lambda: token(hvp_project=None),
    "of no projects": lambda: token(hvp_project=[]),
    "of a project with a slash": lambda: token(hvp_project="a/b"),
    "of numbers": lambda: token(hvp_project=7),
    "of no role": lambda: token(hvp_role=None),
    "of a role of their own": lambda: token(hvp_role="root"),
    "of a list of roles": lambda: token(hvp_role=["admin"]),
    "damaged": lambda: token()[:-4] + "AAAA",
    "no token": lambda: "nonsense",
    "empty": lambda: "",
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_token_that_anybody_else_could_have_made_is_not(forged: str, tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as refusal:
        verifier(key_set(tmp_path, *PRIVATE)).identity(FORGED[forged]())
    assert refusal.value.reason == "CREDENTIALS_INVALID"


def test_an_expired_token_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as refusal:
        verifier(key_set(tmp_path, "ES256")).identity(token(exp=time.time() - 3600))
    assert refusal.value.reason == "CREDENTIALS_EXPIRED"


def test_keys_are_exchanged_while_a_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvp_service.identity.tokens._LOOKED_AFTER_S", 0.0)
    path = key_set(tmp_path, "RS256")
    believing = verifier(path)
    with pytest.raises(ServiceError):
        believing.identity(token("ES256"))
    key_set(tmp_path, "ES256")
    assert believing.identity(token("ES256")).subject == "ada"
    with pytest.raises(ServiceError):
        believing.identity(token("RS256"))
    path.write_text("{")  # half of a file, as somebody writes it
    assert believing.identity(token("ES256")).subject == "ada"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "{", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "AAAA"}]}', '{"keys": 3}'],
)
def test_a_file_without_public_keys_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(TokenKeysError, match=r"keys\.json"):
        read_keys(path)
    with pytest.raises(TokenKeysError, match="nowhere"):
        read_keys(tmp_path / "nowhere")
