// One call with the Vercel AI SDK, told by one JSON object as its argument; prints what came of it as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const { url, key, provider, model, what, headers, providerHeaders, metadata } = JSON.parse(process.argv[2]);
const settings = { baseURL: `${url}/v1`, apiKey: key, headers: providerHeaders };
const models =
  provider === "openai"
    ? createOpenAI(settings).chat
    : createOpenAICompatible({ name: "router", includeUsage: true, ...settings });

let ran = [];
const weather = tool({
  description: "The weather in a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => {
    ran.push(city);
    return `4 degrees in ${city}`;
  },
});
const request = {
  model: models(model),
  prompt: "What is the weather in Oslo?",
  headers,
  maxRetries: 0,
  ...(metadata ? { providerOptions: { router: { metadata }, openai: { metadata } } } : {}),
  ...(what.includes("tools") ? { tools: { get_weather: weather }, stopWhen: stepCountIs(4) } : {}),
};

let result;
let pieces = 0;
if (what.startsWith("stream")) {
  result = streamText(request);
  for await (const piece of result.textStream) pieces += piece ? 1 : 0;
} else {
  result = await generateText(request);
}
const [text, usage, response] = await Promise.all([result.text, result.totalUsage, result.response]);
console.log(JSON.stringify({ text, pieces, ran, tokens: usage.totalTokens, headers: response.headers }));
