"""Deny by default."""

import hashlib

import httpx
import pytest
from starlette.routing import Mount, Route

from libs.errors import ConfigurationError, NotFoundError, UnauthenticatedError
from services.gateway.access import AccessControl, access_control, is_loopback
from services.gateway.api import create_api
from services.gateway.errors import ForbiddenError, MethodNotAllowedError
from services.gateway.routes import ROUTES, Door, find
from tests.unit.gateway.conftest import make_settings

KEY = "correct-horse-battery"
PUBLIC = {"/healthz", "/ping", "/health", "/v2/health/live", "/v2/health/ready"}
FILLED = {
    "{model}": "m",
    "{endpoint}": "e",
    "{project}": "p",
    "{location}": "us-central1",
    "{version}": "1",
    "{alias}": "prod",
    "{deployment_id}": "e.m.1",
    "{operation_id}": "o",
    "{letter_id}": "l",
    "{file}": "swagger-ui.css",
}


def filled(template: str) -> str:
    for name, value in FILLED.items():
        template = template.replace(name, value)
    return template


def api_routes(api) -> set[tuple[str, str]]:
    """Every route of the FastAPI side; the mount of the API page's files counts as one."""
    routes = {(method, route.path) for route in api.routes if isinstance(route, Route) for method in route.methods if method != "HEAD"}
    return routes | {("GET", f"{mount.path}/{{file}}") for mount in api.routes if isinstance(mount, Mount)}


def all_routes(front) -> set[tuple[str, str]]:
    """Every route that the running front has, on either side."""
    return api_routes(front._api) | set(front._reads) | set(front._handlers)


async def test_every_route_of_the_running_app_denies_without_credentials_except_the_public_ones(tmp_path, make):
    async with make(tmp_path, api_keys=f"ops:{KEY}") as world:
        routes = all_routes(world.gateway.front)
        assert len(routes) == len(ROUTES)
        for method, template in sorted(routes):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}):
                answer = await world.http.request(method, filled(template), headers=headers)
                assert (answer.status_code == 401) is (template not in PUBLIC), (method, template, headers, answer.status_code)
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json().keys() & {"error", "message"}
                    assert KEY not in answer.text
            answer = await world.http.request(method, filled(template), headers={"authorization": f"Bearer {KEY}"})
            assert answer.status_code != 401, (method, template)


async def test_what_does_not_exist_is_not_told_to_strangers(tmp_path, make):
    async with make(tmp_path, api_keys=f"ops:{KEY}") as world:
        for method, path in (("GET", "/nowhere"), ("DELETE", "/healthz"), ("GET", "/api/v1/models/%2e%2e"), ("POST", "/api/v1/models")):
            assert (await world.http.request(method, path)).status_code == 401, path


def test_the_table_and_both_sides_have_the_same_routes():
    class Nothing:
        catalog = journal = None
        artifact_max_bytes = 1

    api = create_api(Nothing())  # type: ignore[arg-type]
    assert api_routes(api) == {(route.method, route.template) for route in ROUTES if route.door is not Door.PLAIN}


def test_any_other_address_than_loopback_needs_keys(tmp_path):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigurationError, match=f"listening on {host}.*needs API keys"):
            access_control(make_settings(tmp_path, host=host))
        assert access_control(make_settings(tmp_path, host=host, api_keys=f"a:{KEY}")).needs_keys
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert not access_control(make_settings(tmp_path, host=host)).needs_keys
        assert is_loopback(host)


@pytest.mark.parametrize("keys", ["justakey", "a:short", f"a b:{KEY}", f"a:{KEY},a:{KEY}x", f":{KEY}"])
def test_malformed_keys_are_refused_and_not_shown(tmp_path, keys):
    with pytest.raises(ConfigurationError) as caught:
        access_control(make_settings(tmp_path, api_keys=keys))
    assert KEY not in str(caught.value)


def test_settings_do_not_show_keys(tmp_path):
    assert KEY not in repr(make_settings(tmp_path, api_keys=f"a:{KEY}"))


def test_a_file_of_hashed_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# who: what\nops:{hashlib.sha256(KEY.encode()).hexdigest()}  # Ada\n\n")
    access = access_control(make_settings(tmp_path, api_keys_file=file))
    route = find("GET", "/api/v1/models").route
    assert access.admit(route, {b"authorization": f"Bearer {KEY}".encode()}).name == "ops"
    assert access.admit(route, {b"authorization": f"bearer  {KEY} ".encode()}).name == "ops"
    with pytest.raises(UnauthenticatedError):
        access.admit(route, {b"authorization": b"Bearer \xff\xfe"})
    for text in ("", "ops:zz", KEY):
        file.write_text(text)
        with pytest.raises(ConfigurationError):
            access_control(make_settings(tmp_path, api_keys_file=file))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        access_control(make_settings(tmp_path, api_keys_file=tmp_path / "absent"))


AWS = "AWS4-HMAC-SHA256 Credential={}/20260101/eu-west-1/sagemaker/aws4_request, SignedHeaders=host;x-amz-date, Signature=0a1b"


@pytest.mark.parametrize("key", [KEY, "a/key/with=slashes+16"])
def test_a_key_comes_as_a_bearer_token_or_as_googles_and_amazons_clients_send_it(tmp_path, key):
    access = access_control(make_settings(tmp_path, api_keys=f"ops:{key}"))
    route = find("POST", "/invocations").route
    for headers in (
        {b"authorization": f"Bearer {key}".encode()},
        {b"x-goog-api-key": key.encode()},
        {b"authorization": AWS.format(key).encode()},
        {b"authorization": AWS.format(key).replace(", ", ",").encode()},
        {b"authorization": AWS.format(key).replace("Credential", "SignedHeaders=host, Credential").encode()},
    ):
        assert access.admit(route, headers).name == "ops", headers


def test_other_credentials_are_refused_and_not_shown(tmp_path):
    access = access_control(make_settings(tmp_path, api_keys=f"ops:{KEY}"))
    route = find("POST", "/invocations").route
    for headers in (
        {},
        {b"x-goog-api-key": b""},
        {b"x-goog-api-key": b"wrong"},
        {b"authorization": b"Bearer wrong", b"x-goog-api-key": KEY.encode()},
        {b"authorization": AWS.format("wrong").encode()},
        {b"authorization": AWS.format("").encode()},
        {b"authorization": b"AWS4-HMAC-SHA256"},
        {b"authorization": f"AWS4-HMAC-SHA256 Credential={KEY}".encode()},
        {b"authorization": f"AWS4-HMAC-SHA256 Signature=Credential={KEY}/1/2/3/aws4_request".encode()},
        {b"authorization": f"AWS {KEY}:sig".encode()},
    ):
        with pytest.raises(UnauthenticatedError) as caught:
            access.admit(route, headers)
        assert KEY not in str(caught.value)


def test_without_keys_credentials_of_any_kind_are_passed_over():
    route = find("POST", "/invocations").route
    for value in (AWS.format("x"), "Bearer anything", "nonsense"):
        assert AccessControl({}).admit(route, {b"authorization": value.encode()}).name == "local"


def test_without_keys_web_pages_of_other_sites_cannot_reach_the_gateway_through_a_browser():
    route = find("POST", "/api/v1/endpoints").route
    access = AccessControl({})
    for headers in (
        {b"host": b"evil.example:8080"},
        {b"host": b"127.0.0.1:8080", b"origin": b"https://evil.example"},
        {b"host": b"127.0.0.1:8080", b"origin": b"null"},
        {b"host": b"127.0.0.1:8080", b"sec-fetch-site": b"cross-site"},
        {b"host": b"[::1"},
    ):
        with pytest.raises(ForbiddenError):
            access.admit(route, headers)
    for headers in (
        {},
        {b"host": b"127.0.0.1:8080"},
        {b"host": b"localhost"},
        {b"host": b"[::1]:8080", b"origin": b"http://localhost:3000"},
    ):
        assert access.admit(route, headers).name == "local"


BAD_NAMES = ["a%2Fb", "..", "%2e%2e", "%C3%A9", "a" * 300, "-a", "a-", "a%20b", "a%00", "%0a", "a.b", "a%0A"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("path", ["/api/v1/models/{}", "/api/v1/endpoints/{}/deployments", "/v1/models/{}:predict", "/v2/models/{}/infer"])
def test_a_bad_name_in_a_path_names_the_rule(path, name):
    method = "GET" if path.startswith("/api/v1/models") else "POST"
    found = find(method, path.format(name))
    assert "1 to 63 letters, digits" in str(found.error)
    assert len(str(found.error)) < 300


def test_what_has_no_route():
    assert isinstance(find("GET", "/api/v1/models/a/b").error, NotFoundError)
    assert isinstance(find("GET", "/api/v1/models/a/").error, NotFoundError)
    assert isinstance(find("GET", "/api/v1/models//versions").error, Exception)
    assert isinstance(find("GET", "/x%ff").error, Exception)
    wrong_method = find("PATCH", "/api/v1/endpoints").error
    assert isinstance(wrong_method, MethodNotAllowedError)
    assert wrong_method.allowed == ("POST", "GET", "HEAD")
    assert find("GET", "/v1/models/a:predict").error is not None


def test_head_is_looked_up_as_get():
    for path in ("/healthz", "/api/v1/models/m", "/v2/models/m"):
        assert find("HEAD", path).route is find("GET", path).route is not None
    error = find("HEAD", "/invocations").error
    assert isinstance(error, MethodNotAllowedError)
    assert error.allowed == ("POST",)


@pytest.mark.parametrize("version", ["0", "-1", "01", "1.5", "Prod", "1" * 30, "²"])
def test_a_bad_version_in_a_path_names_the_rule(version):
    assert "a number from 1 on, or an alias" in str(find("GET", f"/api/v1/models/m/versions/{version}").error)


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if name != ".."])  # which clients resolve themselves
async def test_a_bad_name_over_http_is_a_400_and_never_a_detail(world, name):
    for method, path in (
        ("GET", f"/api/v1/models/{name}"),
        ("POST", f"/v1/models/{name}:predict"),
        ("POST", f"/api/v1/models/{name}/versions"),
    ):
        request = httpx.Request(method, world.http.base_url, content=b"{}")
        request.url = world.http.base_url.copy_with(raw_path=path.encode())
        answer = await world.http.send(request)
        assert answer.json().keys() & {"error", "message"}
        assert answer.status_code == 400, (path, answer.text)
