// OpenAI's own JavaScript client against the gateway.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { request } from "node:http";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import OpenAI from "openai";

// Written by test_clients.py: addresses, a picture and its schedules.
const here = JSON.parse(readFileSync(process.env.CLIENT_LAWS, "utf8"));
const options = { apiKey: here.api_key, baseURL: here.base_url, maxRetries: 0 };
const client = new OpenAI(options);
const model = here.model;

const say = (content) => [{ role: "user", content }];
const question = (image = {}) =>
  say([
    { type: "image_url", image_url: { url: here.picture, ...image } },
    { type: "text", text: "What is it?" },
  ]);

const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      description: "The weather of a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

function abandoned() {
  return new Promise((resolve, reject) => {
    const asked = request({ socketPath: here.engine_socket, path: "/seen", agent: false }, async (response) => {
      let text = "";
      for await (const piece of response) text += piece;
      resolve(JSON.parse(text).abandoned);
    });
    asked.on("error", reject).end();
  });
}

test("plain answer", async () => {
  const answer = await client.chat.completions.create({ model, messages: say("Hello") });
  assert.equal(answer.choices[0].message.content, here.answer);
  assert.ok(answer.usage.completion_tokens > 0);
});

test("stream with usage", async () => {
  const stream = await client.chat.completions.create({
    model,
    messages: question(),
    stream: true,
    stream_options: { include_usage: true },
  });
  const texts = [];
  let usage = null;
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) texts.push(chunk.choices[0].delta.content);
    usage = chunk.usage ?? usage;
  }
  assert.equal(texts.join(""), here.answer);
  assert.ok(texts.length > 1);
  assert.equal(usage.visual_tokens.kept, here.plans.high.kept);
});

test("budget of the request", async () => {
  const { usage } = await client.chat.completions.create({ model, messages: question(), visual_token_budget: 320 });
  assert.equal(usage.visual_tokens.saved, here.plans.medium.saved);
  assert.deepEqual(
    usage.visual_tokens.per_image.map((image) => image.budget),
    [320],
  );
  assert.equal(usage.prompt_tokens_details.image_tokens, here.plans.medium.placeholders);
});

test("detail low", async () => {
  const { usage } = await client.chat.completions.create({ model, messages: question({ detail: "low" }) });
  assert.equal(usage.visual_tokens.kept, here.plans.low.kept);
});

test("budget of one picture", async () => {
  const messages = question({ visual_token_budget: 320 });
  const { usage } = await client.chat.completions.create({ model, messages });
  assert.equal(usage.visual_tokens.kept, here.plans.medium.kept);
});

test("budget in a header", async () => {
  const headers = { "X-Visual-Token-Budget": "low" };
  const { usage } = await client.chat.completions.create({ model, messages: question() }, { headers });
  assert.equal(usage.visual_tokens.kept, here.plans.low.kept);
});

test("counts in headers, of a stream before its first token", async () => {
  const asked = client.chat.completions.create({ model, messages: question(), stream: true });
  const { data, response } = await asked.withResponse();
  assert.equal(Number(response.headers.get("x-visual-tokens-full")), here.plans.high.full);
  assert.equal(Number(response.headers.get("x-visual-tokens-saved")), here.plans.high.saved);
  for await (const chunk of data) assert.ok(!("error" in chunk));
});

test("tools there and back", async () => {
  const messages = say("How is the weather?");
  const first = await client.chat.completions.create({ model, messages, tools });
  const { message } = first.choices[0];
  const [call] = message.tool_calls;
  assert.deepEqual([call.function.name, call.function.arguments], ["weather", here.tool_arguments]);
  messages.push(message, { role: "tool", tool_call_id: call.id, content: "rain" });
  const second = await client.chat.completions.create({ model, messages, tools });
  assert.equal(second.choices[0].message.content, here.answer);
});

test("streamed tool call comes together", async () => {
  const stream = client.chat.completions.stream({ model, messages: say("How is the weather?"), tools });
  const { message } = (await stream.finalChatCompletion()).choices[0];
  assert.equal(message.tool_calls[0].function.arguments, here.tool_arguments);
});

test("budget that is too small is a bad request", async () => {
  const asked = client.chat.completions.create({ model, messages: question(), visual_token_budget: 31 });
  await assert.rejects(asked, (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "visual_token_budget");
    assert.match(error.message, /31/);
    return true;
  });
});

test("a budget for all requests goes with those without images", async () => {
  const { usage } = await client.chat.completions.create({ model, messages: say("Hello"), visual_token_budget: 320 });
  assert.equal(usage.visual_tokens.images, 0);
});

test("unknown model is not found", async () => {
  const asked = client.chat.completions.create({ model: "gpt-0", messages: say("Hello") });
  await assert.rejects(asked, OpenAI.NotFoundError);
});

test("wrong key is an authentication error", async () => {
  const stranger = new OpenAI({ ...options, apiKey: "wrong" });
  await assert.rejects(stranger.chat.completions.create({ model, messages: say("Hello") }), OpenAI.AuthenticationError);
});

test("models can be listed", async () => {
  const names = [];
  for await (const entry of client.models.list()) names.push(entry.id);
  assert.deepEqual(names, [model]);
});

test("aborting a stream frees the engine", async () => {
  const before = await abandoned();
  const stream = await client.chat.completions.create({ model, messages: say("Tell it slowly"), stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.choices[0].delta.content);
    stream.controller.abort();
    break;
  }
  const deadline = Date.now() + 2000;
  while ((await abandoned()) === before && Date.now() < deadline) await sleep(20);
  assert.equal(await abandoned(), before + 1);
});
