// The last pictures, in this browser's own storage; the oldest go when it is full.

const KEY = "tapir-history";
const MOST = 60;

export function entries() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(kept) ? kept : [];
  } catch {
    return [];
  }
}

export function add(entry) {
  let kept = [entry, ...entries()].slice(0, MOST);
  while (kept.length) {
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
      return;
    } catch {
      kept = kept.slice(0, kept.length >> 1); // the storage is full
    }
  }
}

export function forget() {
  localStorage.removeItem(KEY);
}
