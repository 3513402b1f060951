"""The client for programs without asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Unpack

import grpc
from opentelemetry.context import Context, get_current

from feddymem.client.channel import MAX_ATTEMPTS, inspection_options
from feddymem.client.errors import InspectionError, from_rpc_error
from feddymem.client.feedback import Opinion
from feddymem.client.images import Image
from feddymem.client.renewal import Renewed
from feddymem.client.requests import ClientSettings, Wishes
from feddymem.client.results import InspectionResult, from_response
from feddymem.client.tls import channel_to
from feddymem.client.tracing import traced_inspection
from feddymem.in_order import in_order
from feddymem.v1.inspection_pb2_grpc import InspectionServiceStub


class InspectionClient:
    """Sends images to an inference service; may be used by several threads at once.

    Args:
        server: HOST:PORT of the inference service, or any gRPC target: `dns:///NAME:PORT` goes round all addresses of a
            name, `ipv4:A:PORT,B:PORT` round those listed.
        federation: name of the federation; may be empty where the service has only one.
        site: site whose line took the images; may be empty where the service has only one, or needs none.
        timeout_seconds: longest wait for one result, all attempts together.
        attempts: how often a call is made that the service is not there for, or too busy, before that is an error;
            1 to 5.
        window: images of one `inspect_many` that are under way at once, at most.
        tls_dir: folder with this program's certificate (tls.crt, tls.key) and the authority that must have issued the
            service's (ca.crt); none: no TLS, for a service on this machine. Renewed files are used from the next
            call on.

    Raises:
        ValueError: a number that makes no sense.
        TlsError: the TLS files cannot be used.

    Example:
        with InspectionClient("127.0.0.1:7072", site="plant-a") as client:
            print(client.inspect("part.png").score)
    """

    def __init__(
        self,
        server: str,
        *,
        federation: str = "",
        site: str = "",
        timeout_seconds: float = 30,
        attempts: int = MAX_ATTEMPTS,
        window: int = 4,
        tls_dir: Path | None = None,
    ) -> None:
        self._settings = ClientSettings(federation, site, timeout_seconds, window)
        options = inspection_options(attempts)
        self._channels = Renewed(lambda: channel_to(server, options, tls_dir), tls_dir)

    def __enter__(self) -> InspectionClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; inspections under way are cancelled."""
        for channel in self._channels.all():
            channel.close()

    def inspect(self, image: Image, **wishes: Unpack[Wishes]) -> InspectionResult:
        """Inspects one image.

        Raises:
            InspectionError: there is no result; its kind says why.
        """
        return self._inspect(image, wishes, get_current())

    def report_feedback(self, image: Image, opinion: Opinion, *, note: str = "") -> str:
        """Reports what was wrong with a verdict: a false alarm or a bad part.

        The image goes to the site's own edge client, where it stays; a false alarm enters the site's bank once an
        operator of the site has accepted it. The last opinion of an image counts; the same one may be reported again.

        Args:
            image: as it was inspected; pixels are sent as PNG.
            opinion: what was wrong.
            note: anything a person adds; at most 1,000 characters.

        Returns:
            SHA-256 of the image file, in hex: its name at the edge client.

        Raises:
            InspectionError: it was not kept; its kind says why.
        """
        request = self._settings.feedback(image, opinion, note)
        stub = InspectionServiceStub(self._channels.channel())
        try:
            return stub.ReportFeedback(request, timeout=self._settings.timeout({})).image
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def inspect_many(
        self, images: Iterable[Image], **wishes: Unpack[Wishes]
    ) -> Iterator[InspectionResult | InspectionError]:
        """Inspects images, several at once; what became of each, in the order of the images.

        Each image is a call of its own: it may go to another server than the one before, and is tried again by itself.
        The images are taken on another thread.
        """
        trace = get_current()  # the threads have their own

        def outcome(image: Image) -> InspectionResult | InspectionError:
            try:
                return self._inspect(image, wishes, trace)
            except InspectionError as error:
                return error

        return in_order(outcome, images, self._settings.window)

    def _inspect(self, image: Image, wishes: Wishes, trace: Context) -> InspectionResult:
        request, timeout = self._settings.request(image, wishes), self._settings.timeout(wishes)
        stub = InspectionServiceStub(self._channels.channel())
        try:
            with traced_inspection(trace) as metadata:
                return from_response(stub.Inspect(request, timeout=timeout, metadata=metadata))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
