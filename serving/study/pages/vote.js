// Without this script the form works, too. With it, an answer is sent again until a server that
// was away is back; the server counts it once.
"use strict";
const form = document.querySelector("form");
const button = form.querySelector("button");
const status = document.getElementById("status");
const PAUSE = 1000; // milliseconds

async function send(body) {
  try {
    return await fetch(form.action, { method: "POST", body, redirect: "manual" });
  } catch (error) {
    return null; // no answer
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  button.disabled = true;
  const body = new URLSearchParams(new FormData(form));
  let response = await send(body);
  while (response === null || response.status >= 500) {
    status.textContent = "The server does not answer. Your answer is kept here and sent again; please leave this page open.";
    await new Promise((resume) => setTimeout(resume, PAUSE));
    response = await send(body);
  }
  if (response.type === "opaqueredirect" || response.status === 409) {
    location.replace(form.action.replace(/\/\d+$/, ""));
    return;
  }
  button.disabled = false;
  status.textContent = "Your answer was refused (" + response.status + "). Please load the page again.";
});
