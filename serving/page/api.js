// Calls of the images API; the token stays in this tab.

const TOKEN = "tapir-token";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

function headers(more = {}) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not an error body of the API
  }
  throw new ApiError(response.status, message);
}

export async function models() {
  const response = await checked(await fetch("v1/models", { headers: headers() }));
  return (await response.json()).data;
}

// Yields the events of a generation, or of an edit if there is a picture.
export async function* draw(fields, image, mask, signal) {
  let request;
  if (image) {
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.append(name, String(value));
    body.append("image", image, "image.png");
    body.append("mask", mask, "mask.png");
    request = fetch("v1/images/edits", { method: "POST", headers: headers(), body, signal });
  } else {
    const body = JSON.stringify(fields);
    const kind = headers({ "Content-Type": "application/json" });
    request = fetch("v1/images/generations", { method: "POST", headers: kind, body, signal });
  }
  const response = await checked(await request);
  yield* events(response.body.pipeThrough(new TextDecoderStream()));
}

async function* events(stream) {
  let text = "";
  const reader = stream.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}
