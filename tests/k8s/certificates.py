"""Whether each service has the certificate that says who it is and by which names it is reached."""

from __future__ import annotations

from collections.abc import Iterator

from services.aggregator.settings import AggregatorSettings
from services.edge_client.settings import EdgeClientSettings
from services.inference.settings import InferenceSettings
from services.runtime.identity import Identity, Role, described, identity_from_uri
from services.runtime.settings import ServiceSettings
from tests.k8s.configuration import Loaded, offered
from tests.k8s.manifests import Object, mounts, named, of_kind, served, title, volumes, workloads


def certificate_problems(objects: list[Object], loaded: Loaded) -> Iterator[str]:
    """Services with no certificate or somebody else's; certificates for nobody, or by nobody."""
    by_secret = {item["spec"]["secretName"]: item for item in of_kind(objects, "Certificate")}
    used = {item["spec"]["ca"]["secretName"] for item in of_kind(objects, "Issuer") if "ca" in item["spec"]}
    yield from (f"Secret/{name} of an Issuer is made by no Certificate" for name in sorted(used - by_secret.keys()))
    for workload in workloads(objects):
        settings = loaded.get(title(workload))
        if settings is None or settings.tls_dir is None:
            continue
        mount = mounts(workload).get(str(settings.tls_dir), {})
        secret = volumes(workload).get(mount.get("name", ""), {}).get("secret", {}).get("secretName")
        if secret is None or not mount.get("readOnly"):
            yield f"{title(workload)}: tls_dir {settings.tls_dir} is not a read-only Secret"
        elif secret in by_secret:
            used.add(secret)
            certificate = by_secret[secret]
            found = [*_identity(objects, certificate, settings, loaded), *_hosts(objects, certificate, workload)]
            yield from (f"{title(certificate)}: {problem}" for problem in found)
    for secret, certificate in by_secret.items():
        if secret not in used:
            yield f"{title(certificate)}: nobody uses its Secret {secret}"
        yield from (f"{title(certificate)}: {problem}" for problem in _issuer(objects, certificate))


def _issuer(objects: list[Object], certificate: Object) -> Iterator[str]:
    reference, issuers = certificate["spec"].get("issuerRef", {}), named(objects, "Issuer")
    if issuers and reference.get("kind") == "Issuer" and reference.get("name") not in issuers:
        yield f"Issuer/{reference.get('name')} does not exist"
    # A new key of an authority makes all that the old one has issued worth nothing; nobody else's should grow old.
    rotation = "Never" if certificate["spec"].get("isCA") else "Always"
    if certificate["spec"].get("privateKey", {}).get("rotationPolicy") != rotation:
        yield f"rotationPolicy is not {rotation}"


def _identity(objects: list[Object], certificate: Object, settings: ServiceSettings, loaded: Loaded) -> Iterator[str]:
    if certificate["spec"].get("isCA"):
        yield "is an authority"
    if not {"server auth", "client auth"} <= set(certificate["spec"].get("usages", [])):
        yield "is not for both ends of a connection"
    uris = certificate["spec"].get("uris", [])
    wanted = _wanted(objects, settings, loaded)
    try:
        [identity] = [identity_from_uri(uri) for uri in uris]
    except ValueError:
        yield f"names {uris}, not one identity"
        return
    if wanted and not any(identity.fits(each) for each in wanted):
        yield f"is that of {identity}, not of {' or '.join(map(described, wanted))}"


def _wanted(objects: list[Object], settings: ServiceSettings, loaded: Loaded) -> list[Identity | Role]:
    if isinstance(settings, AggregatorSettings):
        return [Role.AGGREGATOR]
    if isinstance(settings, EdgeClientSettings):
        return [Identity(Role.SITE, settings.site)]
    assert isinstance(settings, InferenceSettings)
    answering = offered(objects)
    clients = [loaded.get(title(answering[each])) for each in settings.edge_clients if each in answering]
    sites = {each.site for each in clients if isinstance(each, EdgeClientSettings)}
    return [Identity(Role.INFERENCE, site) for site in sorted(sites)]


def _hosts(objects: list[Object], certificate: Object, workload: Object) -> Iterator[str]:
    wanted: set[str] = set()
    published = False
    for service in of_kind(objects, "Service"):
        if served(objects, service) == [workload]:
            name, namespace = service["metadata"]["name"], service["metadata"].get("namespace")
            inside = f"{name}.{namespace}"
            wanted |= {name, inside, f"{inside}.svc", f"{inside}.svc.cluster.local"}
            published = published or service["spec"].get("type") == "LoadBalancer"
    given = set(certificate["spec"].get("dnsNames", []))
    for host in sorted(wanted - given):
        yield f"is not for the host {host}"
    if published and not given - wanted:
        yield "is for no name outside of the cluster"
    for host in sorted(given - wanted) if not published else []:
        yield f"is for the host {host}, which is somebody else"
