"""Who asks, and what the Roles of the cluster let them do."""

from tests.support.kubernetes.store import Json, Refused, Store

ADMIN = "admin"


class Access:
    """Bearer tokens of users and service accounts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._users = {"token-of-admin": ADMIN}

    def token_of(self, space: str, account: str) -> str:
        """The token of a service account; it must exist."""
        self._store.get("ServiceAccount", space, account)
        token = f"token-of-{space}-{account}"
        self._users[token] = f"system:serviceaccount:{space}:{account}"
        return token

    def user(self, header: str) -> str:
        try:
            return self._users[header.removeprefix("Bearer ")]
        except KeyError:
            raise Refused(401, "Unauthorized", "Unauthorized") from None

    def check(self, user: str, verb: str, group: str, resource: str, space: str, name: str) -> None:
        """Raises: Refused if no Role that is bound to a service account allows the request."""
        if user == ADMIN or any(
            _allows(rule, verb, group, resource, name) for rule in self._rules(user, space)
        ):
            return
        raise Refused(
            403,
            "Forbidden",
            f'{resource} "{name}" is forbidden: User "{user}" cannot {verb} resource "{resource}" '
            f'in API group "{group}" in the namespace "{space}"',
        )

    def _rules(self, user: str, space: str) -> list[Json]:
        return [
            rule
            for binding in self._store.select("RoleBinding", space)
            for subject in binding["subjects"]
            if user == f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
            for rule in self._store.get("Role", space, binding["roleRef"]["name"])["rules"]
        ]


def _allows(rule: Json, verb: str, group: str, resource: str, name: str) -> bool:
    names = rule.get("resourceNames", [name])
    if "resourceNames" in rule and verb == "create":
        return False
    is_of = group in rule["apiGroups"] and resource in rule["resources"]
    return is_of and verb in rule["verbs"] and name in names
