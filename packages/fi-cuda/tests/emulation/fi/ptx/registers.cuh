#pragma once

namespace fi::ptx {

template <int kRegisters>
inline void give_registers() {}
template <int kRegisters>
inline void take_registers() {}

}  // namespace fi::ptx
