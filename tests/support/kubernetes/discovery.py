"""What kubectl asks before it sends anything: versions, groups, resources and OpenAPI."""

from typing import Any

KINDS = {
    ("", "v1"): {
        "configmaps": "ConfigMap",
        "pods": "Pod",
        "serviceaccounts": "ServiceAccount",
        "services": "Service",
    },
    ("batch", "v1"): {"jobs": "Job"},
    ("jobset.x-k8s.io", "v1alpha2"): {"jobsets": "JobSet"},
    ("kueue.x-k8s.io", "v1beta1"): {"workloads": "Workload"},
    ("rbac.authorization.k8s.io", "v1"): {"roles": "Role", "rolebindings": "RoleBinding"},
}
"""(API group, version) -> resource -> kind."""
_VERBS = ["create", "delete", "get", "list", "patch", "watch"]


def answer(path: str, without: tuple[str, ...]) -> dict[str, Any] | None:
    """The document of a discovery path; None for other paths. `without`: groups not installed."""
    kinds = {key: value for key, value in KINDS.items() if key[0] not in without}
    if path == "/version":
        return {"major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "apiVersion": "v1", "versions": ["v1"]}
    if path == "/apis":
        groups = [_group(*key) for key in kinds if key[0]]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        roots = [_root(*key) for key in kinds]
        return {"paths": {r[1:]: {"serverRelativeURL": f"/openapi/v3{r}"} for r in roots}}
    for (group, version), resources in kinds.items():
        root = _root(group, version)
        if path == root:
            return {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": f"{group}/{version}".lstrip("/"),
                "resources": [_resource(*each) for each in resources.items()],
            }
        if path == f"/openapi/v3{root}":
            return _openapi(root, group, version, resources)
    return None


def _root(group: str, version: str) -> str:
    return f"/apis/{group}/{version}" if group else f"/api/{version}"


def _group(group: str, version: str) -> dict[str, Any]:
    versions = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [versions], "preferredVersion": versions}


def _resource(name: str, kind: str) -> dict[str, Any]:
    singular = kind.lower()
    return {
        "name": name,
        "singularName": singular,
        "namespaced": True,
        "kind": kind,
        "verbs": _VERBS,
    }


def _openapi(root: str, group: str, version: str, resources: dict[str, str]) -> dict[str, Any]:
    """Just the fact that the server checks fields, so that kubectl leaves that to it."""
    paths = {}
    for name, kind in resources.items():
        of = {"group": group, "version": version, "kind": kind}
        strict = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
        patch = {"parameters": strict, "x-kubernetes-group-version-kind": of, "responses": {}}
        paths[f"{root}/namespaces/{{namespace}}/{name}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "x", "version": "v1"}, "paths": paths}
