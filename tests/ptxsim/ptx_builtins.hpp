// What device code calls by name: printf and failed asserts.
#pragma once
#include "ptx_handlers.hpp"

inline const char* generic_pointer(Machine& m, const Instr& in, int lane, u64 a) {
  if (a >> 56 == 2) {
    check_local(m, in, lane, a - LOCAL_WINDOW, 1);
    return m.local_memory(lane) + (a - LOCAL_WINDOW);
  }
  if (a >> 56 == 1) return m.shared.data() + (a - SHARED_WINDOW);
  m.check_global(in, lane, a, 1);
  return (const char*)a;
}

inline std::string formatted(Machine& m, const Instr& in, int lane, const char* f, const char* values) {
  std::string out;
  size_t at = 0;
  while (*f) {
    if (*f != '%') {
      out += *f++;
      continue;
    }
    if (f[1] == '%') {
      out += '%';
      f += 2;
      continue;
    }
    std::string spec(1, *f++);
    bool wide = false;
    while (*f && !strchr("diouxXeEfFgGaAcsp", *f)) {
      if (*f == 'l' || *f == 'z' || *f == 'j' || *f == 't')
        wide = true;
      else if (*f != 'h')
        spec += *f;
      ++f;
    }
    if (!*f) break;
    char kind = *f++, text[512];
    bool eight = wide || strchr("eEfFgGaAsp", kind);
    at = (at + (eight ? 7 : 3)) & ~(size_t)(eight ? 7 : 3);
    u64 v = 0;
    std::memcpy(&v, values + at, eight ? 8 : 4);
    at += eight ? 8 : 4;
    if (strchr("eEfFgGaA", kind))
      std::snprintf(text, sizeof text, (spec + kind).c_str(), bit_cast<f64>(v));
    else if (kind == 's')
      std::snprintf(text, sizeof text, (spec + kind).c_str(), generic_pointer(m, in, lane, v));
    else if (kind == 'c')
      std::snprintf(text, sizeof text, (spec + kind).c_str(), (int)v);
    else
      std::snprintf(text, sizeof text, (spec + (kind == 'p' ? "#llx" : std::string("ll") + kind)).c_str(),
                    (kind == 'd' || kind == 'i') && !eight ? (unsigned long long)(s64)(s32)v : (unsigned long long)v);
    out += text;
  }
  return out;
}

// A call of printf or of a failed assert.
inline void call_builtin(Machine& m, const Instr& in, u32 lanes) {
  for (u32 left = lanes; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    auto argument = [&](size_t i) {
      u64 v = 0;
      std::memcpy(&v, m.local_memory(lane) + in.call->arguments[i].from, std::min<u32>(8, in.call->arguments[i].bytes));
      return v;
    };
    if (in.call->builtin == "__assertfail")
      m.fault(in, lane,
              std::string("device assertion failed: ") + generic_pointer(m, in, lane, argument(0)) + ", " +
                  generic_pointer(m, in, lane, argument(1)) + ":" + std::to_string((u32)argument(2)));
    const char* format = generic_pointer(m, in, lane, argument(0));
    const char* values = argument(1) ? generic_pointer(m, in, lane, argument(1)) : nullptr;
    if (m.printed.size() < (1u << 20)) m.printed += formatted(m, in, lane, format, values);
    for (auto& r : in.call->results) {
      u32 zero = 0;
      std::memcpy(m.local_memory(lane) + r.to, &zero, 4);
    }
  }
}
