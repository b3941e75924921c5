// The errors of the service, and the message that the user sees for each.

import { say } from "./words.js";

/** An answer that is no success. `status` 0 is no answer at all. */
export class ApiError extends Error {
  constructor(status, { code = null, message = "", param = null, request_id = null } = {}, retryAfter = null) {
    super(message || code || `status ${status}`);
    Object.assign(this, { status, code, param, retryAfter, requestId: request_id });
  }

  static offline = () => new ApiError(0, { code: "offline" });
  static cut = () => new ApiError(0, { code: "cut" });

  static async from(response) {
    const detail = await response.json().then(
      (body) => body.error,
      () => null,
    );
    const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
    return new ApiError(response.status, detail ?? {}, Number.isNaN(seconds) ? null : seconds);
  }
}

const BY_CODE = {
  offline: "error.offline",
  cut: "error.cut",
  wrong_credentials: "error.credentials",
  context_length_exceeded: "error.long",
  insufficient_quota: "error.quota",
  quota_exceeded: "error.quota",
  overloaded: "error.busy",
  model_unavailable: "error.model",
  timeout: "error.timeout",
  store_unavailable: "error.store",
  too_large: "error.large",
};
const BY_STATUS = {
  401: "error.login",
  403: "error.forbidden",
  404: "error.missing",
  413: "error.large",
  429: "error.rate",
};

/** One or two sentences: what happened, and what to do. */
export function explain(error) {
  if (error.status == null) return say("error.page");
  const key = BY_CODE[error.code] ?? BY_STATUS[error.status] ?? (error.status < 500 ? "error.refused" : "error.server");
  const when = error.retryAfter ? ` ${say("error.when", { seconds: error.retryAfter })}` : "";
  return say(key, { message: error.message, id: error.requestId ?? "–" }) + when;
}
