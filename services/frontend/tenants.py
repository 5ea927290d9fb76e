"""Who asks: from an API key to a tenant, and to the request class that its requests run in."""

from __future__ import annotations

import hashlib

from tandem.adapters.deployment import Class, Deployment, Tenant
from tandem.errors import InvalidRequest, PermissionDenied, Unauthenticated

_ANYBODY = Tenant(name="default")
_MOST_KNOWN, _LONGEST_KNOWN = 10_000, 256


class Tenants:
    """Without tenants in the deployment file everybody is the tenant ``default``."""

    def __init__(self, deployment: Deployment) -> None:
        self._classes = {c.name: c for c in deployment.classes}
        self._first_class = deployment.classes[0]
        # Looked up by hash: how long that takes says nothing about how much of a guessed key is right.
        self._by_hash = {digest.lower(): tenant for tenant in deployment.tenants for digest in tenant.api_key_sha256}
        #: Of headers that were right: hashing takes longer than all else about a key.
        self._known: dict[str, Tenant] = {}
        self.open = not deployment.tenants

    def of_authorization(self, header: str | None) -> Tenant:
        """Tenant of an ``Authorization`` header. Unauthenticated if there is none, or a wrong one."""
        if self.open:
            return _ANYBODY
        known = self._known.get(header or "")
        if known is not None:
            return known
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("an API key is needed: Authorization: Bearer <key>")
        tenant = self._by_hash.get(hashlib.sha256(key.strip().encode()).hexdigest())
        if tenant is None:
            raise Unauthenticated("this API key is not known")
        if header and len(header) <= _LONGEST_KNOWN:  # spaces may make the same key as long as a header can be
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[header] = tenant
        return tenant

    def cache_salt(self, tenant: Tenant) -> str:
        """Tenants' prompts have no KV blocks in common, so that none can time another's."""
        return "" if self.open else tenant.name

    def request_class(self, tenant: Tenant, name: str | None) -> Class:
        if not name:
            return self._classes[tenant.request_class] if tenant.request_class else self._first_class
        found = self._classes.get(name)
        if found is None:
            known = ", ".join(self._classes)
            raise InvalidRequest(f"request_class: no class {name!r}; there are: {known}", param="request_class")
        if tenant.allowed_classes and name not in tenant.allowed_classes:
            raise PermissionDenied(f"tenant {tenant.name!r} may not use class {name!r}", param="request_class")
        return found
