// Test bench: prints "value plus minus" (decimal, hexadecimal masks) for every value of the width.
module tb_naf_encoder;
    parameter WIDTH = 8;

    reg  signed [WIDTH-1:0] value;
    wire        [WIDTH-1:0] plus, minus;
    integer n;

    naf_encoder #(.WIDTH(WIDTH)) encoder (.value(value), .plus(plus), .minus(minus));

    initial
        for (n = -(1 << (WIDTH - 1)); n < (1 << (WIDTH - 1)); n = n + 1) begin
            value = n;
            #1 $display("%0d %h %h", value, plus, minus);
        end
endmodule
