// Without this script the form works, too. With it, an answer is sent again until a server that
// was away is back; the server counts it once. Pictures are asked for again, too, and nobody can
// answer before both are there.
"use strict";
const form = document.querySelector("form");
const button = form.querySelector("button");
const status = document.getElementById("status");
const pictures = [...form.querySelectorAll("img")];
const PAUSE = 1000; // milliseconds
let sending = false;

const pause = () => new Promise((resume) => setTimeout(resume, PAUSE));

function show() {
  button.disabled = sending || !pictures.every((picture) => picture.naturalWidth > 0);
}

async function again(picture) {
  status.textContent = "A picture did not arrive; it is asked for again.";
  await pause();
  picture.src = picture.src;
}

for (const picture of pictures) {
  picture.addEventListener("load", () => {
    status.textContent = "";
    show();
  });
  picture.addEventListener("error", () => again(picture));
  if (picture.complete && picture.naturalWidth === 0) again(picture);
}
show();

async function send(body) {
  try {
    return await fetch(form.action, { method: "POST", body, redirect: "manual" });
  } catch (error) {
    return null; // no answer
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  sending = true;
  show();
  const body = new URLSearchParams(new FormData(form));
  let response = await send(body);
  while (response === null || response.status >= 500) {
    status.textContent = "The server does not answer. Your answer is kept here and sent again; please leave this page open.";
    await pause();
    response = await send(body);
  }
  if (response.type === "opaqueredirect" || response.status === 409) {
    location.replace(form.action.replace(/\/\d+$/, ""));
    return;
  }
  sending = false;
  show();
  status.textContent = "Your answer was refused (" + response.status + "). Please load the page again.";
});

// A page that the back button brings from memory shows pictures that are answered.
window.addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});
