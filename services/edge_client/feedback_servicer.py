"""FeedbackService: a thin adapter over what is kept."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
from grpc import aio

from feddymem.image_data import EncodedImage
from feddymem.images import read
from feddymem.v1 import feedback_pb2_grpc
from feddymem.v1.feedback_pb2 import (
    DecideFeedbackRequest,
    DecideFeedbackResponse,
    Decision,
    GetFeedbackOwnerRequest,
    GetFeedbackOwnerResponse,
    KeepFeedbackRequest,
    KeepFeedbackResponse,
    ListFeedbackRequest,
    ListFeedbackResponse,
)
from services.edge_client import metrics
from services.edge_client.feedback import FeedbackStore
from services.edge_client.settings import EdgeClientSettings
from services.runtime.audit import audited
from services.runtime.errors import Refusal, not_found
from services.runtime.feedback import OPINIONS, require_feedback
from services.runtime.identity import Identity, Role, caller, denied
from services.runtime.server import Service
from services.runtime.words import word_of

_Context = aio.ServicerContext[Any, Any]
_ACCESS = {
    "GetFeedbackOwner": Role.INFERENCE,
    "KeepFeedback": Role.INFERENCE,
    "ListFeedback": Role.SITE,
    "DecideFeedback": Role.SITE,
}
"""Who may, where the certificate's name is that of this site: its inference services, and its operators, who show a
certificate of the site itself. Operators of the federation may not: images are none of their business."""
_ACTIONS = {"KeepFeedback": "keep_feedback", "DecideFeedback": "decide_feedback"}
"""Of each method, for the audit log."""


class FeedbackServicer(feedback_pb2_grpc.FeedbackServiceServicer):
    """Serves what is kept of one federation and site, once `begin` has said what it is."""

    def __init__(self, settings: EdgeClientSettings) -> None:
        self._settings = settings
        self._store: FeedbackStore | None = None
        self._decoding = asyncio.Lock()
        for opinion in OPINIONS.values():
            metrics.FEEDBACK.labels(opinion)

    def begin(self, store: FeedbackStore) -> None:
        """Serves from now on; until then calls are UNAVAILABLE."""
        self._store = store

    @property
    def service(self) -> Service:
        """What a server needs to serve this."""
        return Service(
            "feddymem.v1.FeedbackService",
            lambda server: feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(self, server),
            access={method: frozenset({role}) for method, role in _ACCESS.items()},
            audited=_ACTIONS,
        )

    async def GetFeedbackOwner(self, _request: GetFeedbackOwnerRequest, context: _Context) -> GetFeedbackOwnerResponse:
        """See feedback.proto."""
        self._require(Role.INFERENCE, context)
        return GetFeedbackOwnerResponse(federation=self._settings.federation, site=self._settings.site)

    async def KeepFeedback(self, request: KeepFeedbackRequest, context: _Context) -> KeepFeedbackResponse:
        """See feedback.proto."""
        with audited(context, "keep_feedback", request.federation, request.site):
            store = self._require(Role.INFERENCE, context)
            if (request.federation, request.site) != (self._settings.federation, self._settings.site):
                raise not_found(
                    f"this edge client is not that of site {request.site!r} in federation {request.federation!r}"
                )
            require_feedback(request)
            image = EncodedImage(request.encoded)
            async with self._decoding:  # one at a time: a decoded image may be a hundred times as large
                await asyncio.to_thread(read, image, self._settings.max_pixels, self._settings.input_size)
            name = await asyncio.to_thread(store.keep, request.encoded, request.opinion, request.note)
        metrics.FEEDBACK.labels(OPINIONS[request.opinion]).inc()
        return KeepFeedbackResponse(image=name)

    async def ListFeedback(self, request: ListFeedbackRequest, context: _Context) -> ListFeedbackResponse:
        """See feedback.proto."""
        store = self._require(Role.SITE, context)
        return ListFeedbackResponse(feedback=await asyncio.to_thread(store.kept, request.undecided))

    async def DecideFeedback(self, request: DecideFeedbackRequest, context: _Context) -> DecideFeedbackResponse:
        """See feedback.proto."""
        known = request.decision in Decision.values()
        decision = word_of(Decision.Name(request.decision)) if known else "?"
        image = request.image if re.fullmatch(r"[0-9a-f]{1,64}", request.image) else "?"
        with audited(context, f"{decision} {image}", self._settings.federation, self._settings.site):
            store = self._require(Role.SITE, context)
            return DecideFeedbackResponse(image=await asyncio.to_thread(store.decide, request.image, request.decision))

    def _require(self, role: Role, context: _Context) -> FeedbackStore:
        """What is kept, for somebody of this site.

        Raises:
            Refusal: PERMISSION_DENIED for anybody else; UNAVAILABLE before `begin`.
        """
        who, wanted = caller(context), Identity(role, self._settings.site)
        if who is not None and who != wanted:
            raise denied(f"the certificate is that of {who}; what is kept here is for {wanted}")
        if self._store is None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "this edge client is still starting; try again in some seconds")
        return self._store
