// One way to ask the store: the body, or the trouble in words. Nothing here throws.
const KEY = "singlestream-token";

export function giveToken(token) {
  sessionStorage.setItem(KEY, token);
}

export async function getJson(path) {
  const token = sessionStorage.getItem(KEY);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  try {
    const reply = await fetch(path, { headers, signal: AbortSignal.timeout(10000) });
    const body = await reply.json();
    if (reply.ok) return { body, trouble: null, status: reply.status };
    return { body: null, trouble: `${body.title}: ${body.detail}`, status: reply.status };
  } catch (error) {
    return { body: null, trouble: `The value store does not answer (${error.message}).`, status: 0 };
  }
}

export const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
export const whole = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));
export const clock = (seconds) => (seconds > 0 ? new Date(seconds * 1000).toLocaleTimeString() : "never");
