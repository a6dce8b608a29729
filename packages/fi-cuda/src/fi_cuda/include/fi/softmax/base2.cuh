// Natural logits in base 2, where an exponential is one instruction.
#pragma once

namespace fi {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace fi
