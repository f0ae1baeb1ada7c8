"""A Hub on loopback for the tests: repositories in memory, the calls of pushing and loading, one token that may
write."""

import base64
import hashlib
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pytest
import transformers
import yaml

from mmesid.hub_cards.licences import HUB_LICENCES


TOKEN = "hf_loopback"
REPOSITORY = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
# Outside the API the address of a model has no prefix.
PAGE = r"(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+?)"
LFS_SUFFIXES = (".safetensors", ".parquet", ".pt", ".pth")

# What the Hub takes, as its own refusals list it.
LICENCES = HUB_LICENCES | {"other"}
SIZES = set(
    "n<1K 1K<n<10K 10K<n<100K 100K<n<1M 1M<n<10M 10M<n<100M 100M<n<1B 1B<n<10B 10B<n<100B 100B<n<1T n>1T".split()
)
REPOSITORY_ID = r"([\w.-]+/)?[\w.-]{1,96}"


class Repository:
    """Branches of commits; a commit is the files it holds."""

    def __init__(self, private: bool):
        self.private = private
        self.gated = False
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, or the commit itself; `None` if there is none."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(self.branches[branch].encode())
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + files[name])
        self.commits[digest.hexdigest()] = files
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def open_pull_request(self, branch: str) -> str:
        """Makes the branch of a new pull request and returns its name."""
        number = 1 + sum(name.startswith("refs/pr/") for name in self.branches)
        self.branches[f"refs/pr/{number}"] = self.branches[branch]
        return f"refs/pr/{number}"


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        # Digests of the large files that were taken, one per upload.
        self.uploads: list[str] = []
        # How many more large files are taken before the connection breaks; None never breaks.
        self.uploads_left: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """The environment variables of a process that talks to this Hub, with a token that may write."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo: str, kind: str = "models") -> dict[str, bytes]:
        """What the main branch of a repository holds."""
        repository = self.repositories[kind, repo]
        return repository.commits[repository.branches["main"]]

    def history(self, repo: str, kind: str = "models") -> list[dict[str, bytes]]:
        """The files of every commit but the empty first one, oldest first."""
        return list(self.repositories[kind, repo].commits.values())[1:]

    def everything(self) -> bytes:
        """Every byte that was ever published, names of files included."""
        return b"".join(
            f"\n{kind}/{repo}/{name}\n".encode() + content
            for (kind, repo), repository in self.repositories.items()
            for files in repository.commits.values()
            for name, content in files.items()
        )


def connect(patch: pytest.MonkeyPatch, hub: Hub, home: str) -> None:
    """Turns this process, which was started offline, to the Hub, as [`Hub.environment`] does with another process."""
    for name, value in hub.environment(home).items():
        patch.setenv(name, value)
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    patch.setattr(transformers.utils.hub, "_hf_api", None)
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", f"{home}/modules")
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


class Refused(Exception):
    """Status, the Hub's code of the error, and a message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format, *arguments):
        """Nobody reads a line per request."""

    def handle_request(self):
        address = urlsplit(self.path)
        self.path, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self.read_body()
        try:
            self.route()
        except Refused as refused:
            status, code, message = refused.args
            self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def route(self):
        for methods, pattern, needs_token, answer in ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in methods.split():
                token = self.headers.get("Authorization")
                if needs_token and token is None:
                    raise Refused(401, "Unauthorized", "Invalid username or password.")
                if needs_token and token != f"Bearer {TOKEN}":
                    raise Refused(403, "Forbidden", "This token may not write.")
                return answer(self, **match.groupdict())
        raise Refused(404, "NotFound", f"The loopback Hub has no {self.command} {self.path}.")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, body=b"", content_type: str = "application/json", **headers: str):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, kind: str, repo: str, revision: str = "main") -> tuple[Repository, str]:
        """The repository and the commit of the revision; raises `Refused` where there is none."""
        repository = self.server.repositories.get((kind, repo))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known):
            # To a stranger a private repository looks like none.
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if repository.gated and not known:
            raise Refused(403, "GatedRepo", f"Access to model {repo} is restricted.")
        commit = repository.resolve(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def validate_card(self):
        card = json.loads(self.body)
        errors, warnings = card_problems(card["content"], card["repoType"])
        problems = {"errors": errors, "warnings": warnings}
        described = {kind: [{"message": text} for text in texts] for kind, texts in problems.items()}
        self.answer(400 if errors else 200, described)

    def create_repository(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        key = (wanted.get("type", "model") + "s", repo)
        url = f"{self.server.url}/{'' if key[0] == 'models' else 'datasets/'}{repo}"
        if key in self.server.repositories:
            return self.answer(409, {"error": "You already created this repository", "url": url})
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.server.repositories[key] = Repository(private)
        self.answer(200, {"url": url, "name": repo})

    def create_branch(self, kind: str, repo: str, branch: str):
        repository, commit = self.repository(kind, repo)
        if branch in repository.branches:
            raise Refused(409, "Conflict", f"Reference already exists: {branch}")
        repository.branches[branch] = commit
        self.answer(200, {})

    def preupload(self, kind: str, repo: str, revision: str):
        repository, commit = self.repository(kind, repo, revision)
        files = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            large = path.endswith(LFS_SUFFIXES)
            content = repository.commits[commit].get(path)
            digest = None if content is None else (large_digest(content) if large else git_digest(content))
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": digest})
        self.answer(200, {"files": files})

    def commit(self, kind: str, repo: str, revision: str):
        repository, parent = self.repository(kind, repo, revision)
        files = dict(repository.commits[parent])
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
        page = f"{self.server.url}/{'' if kind == 'models' else 'datasets/'}{repo}"
        pull_request = {}
        if "create_pr" in self.query:
            revision = repository.open_pull_request(revision)
            pull_request = {"pullRequestUrl": f"{page}/discussions/{revision.rpartition('/')[2]}"}
        commit = repository.commit(revision, files)
        url = f"{page}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""} | pull_request)

    def large_file_batch(self, kind: str | None, repo: str):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/_lfs/{wanted['oid']}", "header": {}}}
            known = wanted["oid"] in self.server.large_files
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if known else {"actions": upload}))
        self.answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def receive_large_file(self, oid: str):
        if large_digest(self.body) != oid:
            raise Refused(400, "BadRequest", "The content does not have this digest.")
        if self.server.uploads_left is not None:
            if self.server.uploads_left == 0:
                self.server.uploads_left = None
                raise Refused(507, "InsufficientStorage", "The upload broke off.")
            self.server.uploads_left -= 1
        self.server.large_files[oid] = self.body
        self.server.uploads.append(oid)
        self.answer(200)

    def describe(self, kind: str, repo: str, revision: str | None):
        repository, commit = self.repository(kind, repo, revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        gated = "manual" if repository.gated else False
        description = {"id": repo, "sha": commit, "private": repository.private, "tags": [], "gated": gated}
        self.answer(200, description | {"siblings": siblings})

    def list_folder(self, kind: str, repo: str, revision: str, folder: str | None = None):
        repository, commit = self.repository(kind, repo, revision)
        inside = "" if folder is None else f"{folder}/"
        entries = [entry for entry in tree(repository.commits[commit]) if entry["path"].startswith(inside)]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(inside)]
        if inside and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.answer(200, entries)

    def send_file(self, kind: str | None, repo: str, revision: str, name: str):
        repository, commit = self.repository((kind or "models/").rstrip("/"), repo, revision)
        content = repository.commits[commit].get(name)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        tag = f'"{git_digest(content)}"'
        self.answer(200, content, "application/octet-stream", ETag=tag, X_Repo_Commit=commit)


def card_problems(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the front matter of a card, in the fields that this project writes."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        return [text for valid, text in rules(yaml.safe_load(match[1]), repo_type) if not valid], []
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        return [f"the metadata do not have the form of the Hub's: {error}"], []


def rules(data: dict, repo_type: str):
    """Whether the metadata keep a rule, and what the Hub says if they do not, for each rule."""

    def is_text(value) -> bool:
        return isinstance(value, str) and value.strip() != ""

    def is_id(value) -> bool:
        return isinstance(value, str) and re.fullmatch(REPOSITORY_ID, value) is not None

    def several(name: str) -> list:
        value = data.get(name, [])
        return value if isinstance(value, list) else [value]

    yield set(several("license")) <= LICENCES, f'"license" must be one of {sorted(LICENCES)}'
    name = data.get("license_name", "absent")
    yield re.fullmatch(r"[a-z0-9.-]+", name), '"license_name" is no identifier'
    yield (data.get("license") == "other") == ("license_name" in data), '"license_name" belongs to license "other"'
    for name in ("tags", "datasets", "model-index"):
        yield isinstance(data.get(name, []), list), f'"{name}" must be an array'
    yield all(map(is_text, several("tags"))), '"tags" must hold strings'
    for name in ("datasets", "base_model"):
        yield all(map(is_id, several(name))), f'"{name}" with value {data.get(name)} is not valid. Use ids of the Hub'
    for name in ("library_name", "model_name", "pretty_name"):
        yield is_text(data.get(name, "absent")), f'"{name}" must be a string'
    yield set(several("size_categories")) <= SIZES, f'"size_categories" must be one of {sorted(SIZES)}'
    for config in several("configs") if repo_type == "dataset" else []:
        yield is_text(config.get("config_name")), '"configs.config_name" is required'
        yield isinstance(config.get("default", False), bool), '"configs.default" must be a boolean'
        for files in config.get("data_files", []):
            yield is_text(files.get("split")) and is_text(files.get("path")), '"data_files" need split and path'
    for entry in several("model-index"):
        yield is_text(entry.get("name")) and entry.get("results"), '"model-index" needs name and results'
        for result in entry["results"]:
            dataset = result.get("dataset", {})
            named = is_text(result.get("task", {}).get("type")) and is_text(dataset.get("name"))
            yield named and result.get("metrics"), '"model-index.results" need task.type, dataset.name and metrics'
            yield is_id(dataset.get("type")), '"model-index.results.dataset.type" is no id of the Hub'
            for metric in result.get("metrics", []):
                value = metric.get("value")
                is_number = isinstance(value, (int, float)) and math.isfinite(value)
                yield is_text(metric.get("type")), '"model-index.results.metrics.type" is required'
                yield is_number or is_text(value), '"model-index.results.metrics.value" is no number'


def tree(files: dict[str, bytes]) -> list[dict]:
    """Files and folders of a commit, as the Hub describes them."""
    folders = {name[:end] for name in files for end, letter in enumerate(name) if letter == "/"}
    entries = [("directory", name, name.encode(), 0) for name in folders]
    entries += [("file", name, content, len(content)) for name, content in files.items()]
    return [
        {"type": kind, "oid": git_digest(content), "size": size, "path": name}
        for kind, name, content, size in sorted(entries, key=lambda entry: entry[1])
    ]


def large_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# Methods, path, whether the writer's token is needed, handler.
ROUTES = [
    ("POST", r"/api/validate-yaml", False, Handler.validate_card),
    ("POST", r"/api/repos/create", True, Handler.create_repository),
    ("POST", rf"/api/{REPOSITORY}/branch/(?P<branch>.+)", True, Handler.create_branch),
    ("POST", rf"/api/{REPOSITORY}/preupload/{REVISION}", True, Handler.preupload),
    ("POST", rf"/api/{REPOSITORY}/commit/{REVISION}", True, Handler.commit),
    ("POST", rf"/{PAGE}\.git/info/lfs/objects/batch", True, Handler.large_file_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", False, Handler.receive_large_file),
    ("GET", rf"/api/{REPOSITORY}(?:/revision/{REVISION})?", False, Handler.describe),
    ("GET", rf"/api/{REPOSITORY}/tree/{REVISION}(?:/(?P<folder>.+))?", False, Handler.list_folder),
    ("GET HEAD", rf"/{PAGE}/resolve/{REVISION}/(?P<name>.+)", False, Handler.send_file),
]
